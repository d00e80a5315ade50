"""Metadata of the package that depend on where the repository is: its addresses, and a README that reads well there.

Hatch runs this when it builds (`pyproject.toml`). The repository's address comes from TESSERACT_REPOSITORY, as for the
site. Where it is not set, the package has no addresses, and its README has words instead of links that lead nowhere.
"""

import os
import re
from pathlib import Path
from typing import Any

try:
    from hatchling.metadata.plugin.interface import MetadataHookInterface
except ImportError:  # outside of a build
    MetadataHookInterface = object

LINK = re.compile(r"(!?)\[((?:[^\[\]`]|`[^`]*`)*)\]\((?!\w+://)([^)\s]+)\)")
POINTER = re.compile(r"\s*\(\[[^\]]*\]\((?!\w+://)[^)\s]+\)\)")  # " ([how](docs/how-to/embed.md))"
PICTURE = re.compile(r"!\[[^\]]*\]\((?!\w+://)[^)\s]+\)\n+(?:\*[^*\n]+\*\n+)?")  # and its caption
COMMENT = re.compile(r"<!--.*?-->\n*", flags=re.S)


def readme(text: str, repository: str) -> str:
    """Return the README with whole addresses instead of paths in the repository, or without them if that is empty."""

    def whole(found: re.Match[str]) -> str:
        is_image, said, path = found.groups()
        if not repository:
            return str(said)
        at = f"{'raw' if is_image else 'blob'}/main/{'README.md' if path.startswith('#') else ''}{path}"
        return f"{is_image}[{said}]({repository}/{at})"

    text = COMMENT.sub("", text)
    return LINK.sub(whole, text if repository else PICTURE.sub("", POINTER.sub("", text)))


def urls(repository: str) -> dict[str, str]:
    """Return the package's addresses by name."""
    pages = {"Documentation": "tree/main/docs", "Changelog": "blob/main/CHANGELOG.md", "Issues": "issues"}
    named = {name: f"{repository}/{page}" for name, page in pages.items()}
    return {"Repository": repository} | named if repository else {}


class CustomMetadataHook(MetadataHookInterface):
    """Hatch's hook."""

    def update(self, metadata: dict[str, Any]) -> None:
        repository = os.environ.get("TESSERACT_REPOSITORY", "").rstrip("/")
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": readme(text, repository)}
        if repository:
            metadata["urls"] = urls(repository)
