"""Holds the house's dependency rules: which room may import which, and which files stay pure."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tesseract_async"

# Each room and the rooms that it may import, besides itself. One line per room; read from the bottom up.
BASE = {"errors", "metrics", "uncopied"}
LOWER = BASE | {"identity", "admission", "wire"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "metrics": {"uncopied"},
    "leaving": set(),
    "uncopied": set(),
    "identity": BASE,
    "admission": BASE | {"identity"},
    "wire": BASE,
    "transport": LOWER,
    "network": LOWER | {"transport"},
    "endpoint": LOWER | {"transport"},
    "nat": LOWER | {"transport", "network", "endpoint"},
    "experts": LOWER | {"transport", "network", "endpoint"},
    "node": LOWER | {"transport", "network", "endpoint", "nat", "experts"},
    "runtime": LOWER | {"transport", "network", "endpoint", "experts", "node"},
    "server": LOWER | {"transport", "network", "endpoint", "experts", "node", "runtime"},
    "client": LOWER | {"transport", "network", "endpoint", "experts", "node", "runtime"},
    "testing": LOWER | {"transport", "network", "endpoint", "experts", "node"},
    "monitoring": LOWER | {"transport", "network", "endpoint", "experts", "node"},
    "cli": LOWER
    | {"transport", "network", "endpoint", "nat", "experts", "node", "runtime", "server", "client", "testing"}
    | {"monitoring", "leaving"},
}
# TesseractNode.get_expert returns a RemoteExpert: the one arrow that points up, taken when it is called.
EXCEPTIONS = {("node.py", "client")}

PURE = [
    "wire/frames.py",
    "wire/packed.py",
    "wire/calls.py",
    "endpoint/budget.py",
    "endpoint/pool.py",
    "wire/codecs.py",
    "wire/messages.py",
    "wire/tensors.py",
    "wire/compression.py",
    "transport/address_scope.py",
    "nat/webrtc/congestion.py",
    "transport/dial_budget.py",
    "nat/webrtc/message_stream.py",
    "nat/offers.py",
    "nat/preamble.py",
    "transport/waiting_room.py",
    "wire/stun.py",
    "transport/tls.py",
    "endpoint/events.py",
    "endpoint/lanes.py",
    "endpoint/liveness.py",
    "endpoint/protocol.py",
    "endpoint/quotas.py",
    "endpoint/replies.py",
    "endpoint/small_calls.py",
    "endpoint/transfers.py",
    "endpoint/under_way.py",
    "endpoint/windows.py",
    "network/calls.py",
    "network/contacts.py",
    "network/datagrams.py",
    "network/dialback.py",
    "network/events.py",
    "network/holding.py",
    "network/limits.py",
    "network/lookup.py",
    "network/operations.py",
    "network/protocol.py",
    "network/reading.py",
    "network/region.py",
    "network/replication.py",
    "network/routing.py",
    "network/settings.py",
    "network/shares.py",
    "network/storage.py",
    "network/tokens.py",
    "network/values.py",
    "network/writing.py",
    "transport/token_bucket.py",
    "transport/throttle.py",
    "experts/choice.py",
    "experts/authority.py",
    "experts/lineage.py",
    "experts/members.py",
    "experts/merkle.py",
    "experts/tenure.py",
    "experts/tenure_base.py",
    "experts/tenure_words.py",
    "experts/terms.py",
    "experts/grants.py",
    "experts/grid.py",
    "experts/masks.py",
    "experts/run.py",
    "experts/signed.py",
    "runtime/batcher.py",
    "runtime/costs.py",
    "server/contract.py",
    "client/arguments.py",
    "client/beam_search.py",
    "client/latency.py",
    "client/parts.py",
    "cli/units.py",
]
IMPURE_MODULES = {"asyncio", "socket", "threading", "time", "concurrent"}
THREADS_ALLOWED = {"runtime/runtime.py", "client/autograd.py", "client/background.py"}
# The codecs of large tensors only, functions that share nothing: their threads are not the loop's default executor.
THREADS_ALLOWED |= {"runtime/encoding.py"}
WITHOUT_TORCH = ("network", "endpoint", "transport", "nat", "identity")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return
    here = room(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "tesseract_async" and parts[1:] not in ([], ["__version__"]) and parts[1] != here:
            allowed = parts[1] in MAY_IMPORT[here] or (path.name, parts[1]) in EXCEPTIONS
            assert allowed, f"{path.relative_to(PACKAGE)} imports {name}"


@pytest.mark.parametrize("name", PURE)
def test_pure_files_do_no_io(name: str) -> None:
    used = {module.split(".")[0] for module in imported(PACKAGE / name)}
    assert not used & IMPURE_MODULES, f"{name} is a pure file"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_threads_are_crossed_in_three_files_only(path: Path) -> None:
    if str(path.relative_to(PACKAGE)) in THREADS_ALLOWED:
        return
    used = {module.split(".")[0] for module in imported(path)}
    assert not used & {"threading", "concurrent", "queue"}


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_a_bootstrap_node_starts_without_torch(name: str) -> None:
    code = (
        "import sys, importlib, pkgutil\n"
        f"module = importlib.import_module('tesseract_async.{name}')\n"
        "for item in pkgutil.iter_modules(getattr(module, '__path__', [])):\n"
        f"    if item.name != 'webrtc':\n"  # aiortc's: imported with the first data channel
        f"        importlib.import_module('tesseract_async.{name}.' + item.name)\n"
        "assert 'torch' not in sys.modules\n"
        "assert 'aiortc' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, tesseract_async; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
