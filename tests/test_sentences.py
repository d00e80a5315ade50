"""The page *When it goes wrong* quotes what the code says, the reference has a table of all public names, and each
docstring says what a thing is or does."""

import ast
import re
from functools import cache
from pathlib import Path

import tesseract_async

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "how-to" / "troubleshooting.md"
REFERENCE = ROOT / "docs" / "reference" / "python.md"


@cache
def said() -> str:
    """Every text of the package, with … for what is filled in."""
    found = []
    for path in (ROOT / "tesseract_async").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [one.value if isinstance(one, ast.Constant) else "…" for one in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%(\.\df|[sd])", "…", node.value))
    return "\n".join(found)


def test_sentences_that_the_page_explains_are_said_somewhere() -> None:
    rows = re.findall(r"^\| (`.*?) \| ", PAGE.read_text(encoding="utf-8"), flags=re.M)
    assert len(rows) > 25
    for row in rows:
        for fragment in row.replace("`", "…").split("…"):
            assert fragment.strip() in said(), f"{row}: nothing says {fragment.strip()!r}"


def test_nobody_is_sent_to_an_index_where_the_package_is_not() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for text in (said(), *(page.read_text(encoding="utf-8") for page in pages)):
        assert not re.search(r"pip install '?tesseract-async", text)


def test_the_reference_begins_with_a_table_of_all_public_names() -> None:
    table = re.findall(r"\[`(\w+)`\]\(", REFERENCE.read_text(encoding="utf-8"))
    assert sorted(table) == sorted(tesseract_async.__all__)


def test_a_docstring_says_what_a_thing_is_or_does() -> None:
    """It begins neither with a question about the thing nor with half a phrase; an attribute's doesn't, either."""
    begins = r"What|Whether|Of|How|Who|Whose|Whom|Where|When|Which|Why|Else|The one|Those|These|In which|That (is|are)"
    begins += r"|(By|From|To) (which|whom|what|how)|So (many|much|long|often)|(For|After) (so|how)|Once it"
    riddle = re.compile(rf'^ *"""(({begins})\b|\.\.\.).*', re.M)
    paths = (ROOT / "tesseract_async").rglob("*.py")
    found = {path.name: [one[0] for one in riddle.finditer(path.read_text(encoding="utf-8"))] for path in paths}
    assert not {name: lines for name, lines in found.items() if lines}
