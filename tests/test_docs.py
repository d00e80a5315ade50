"""The documents stay true: links lead somewhere, Python runs, commands and flags exist, generated pages are whole."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import torch

import tesseract_async as ta
from tesseract_async.cli.main import COMMANDS, main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = ["README.md", "docs/tutorial.md"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.S | re.M)


def commands_in(text: str) -> list[list[str]]:
    """Every call of `tesseract` in a page: in indented and fenced blocks, lines joined at backslashes."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    found = [line.strip().removeprefix("$ ") for line in lines if line.startswith(("    ", "tesseract ", "srun "))]
    words = [re.sub(r"^srun bash -c '(.*)'$", r"\1", line) for line in found]
    return [shlex.split(line, comments=True) for line in words if line.startswith("tesseract ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            generated = target.endswith(("commands.md", "metrics.md"))
            assert generated or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_are_python(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_their_flags_exist(page: Path) -> None:
    for words in commands_in(page.read_text()):
        if words[1].startswith("-"):
            continue
        assert words[1] in COMMANDS, words
        command = main.get_command(click.Context(main), words[1])
        assert command is not None
        flags = {flag for parameter in command.params for flag in parameter.opts} | {"--help", "-h"}
        for word in words[2:]:
            if word.startswith("-"):
                assert word in flags, f"tesseract {words[1]} has no {word}"


async def test_python_of_readme_and_tutorial_runs() -> None:
    module = torch.nn.Linear(1024, 1024)
    backend = ta.ExpertBackend(module, args_schema=(ta.TensorSpec((1024,)),))
    async with ta.TesseractNode() as host, ta.TesseractServer(host, {"ffn.3.8": backend}):
        for page in RUN:
            for block in blocks(ROOT / page, "python"):
                code = block.replace("198.51.100.7:31337", host.address)
                names: dict[str, Any] = {"ta": ta, "torch": torch, "node": host, "x": torch.randn(2, 1024)}
                names["loss"] = lambda y: y.square().mean()
                compiled = compile(code, page, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
                result = eval(compiled, names)
                if result is not None:
                    await result


def test_pages_that_follow_from_the_code_are_whole() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert all(f"## tesseract {name}\n" in generate.commands() for name in COMMANDS)
    assert "| `expert_calls` | counter | method | node |" in generate.metrics()
