"""Holds the house's dependency rules: which room may import which, and which files stay pure."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tesseract_async"

# Each room and the rooms that it may import, besides itself. One line per room; read from the bottom up.
BASE = {"errors", "files", "lru", "metrics", "tasks", "uncopied"}
LOWER = BASE | {"identity", "admission", "wire"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "lru": set(),
    "metrics": {"uncopied"},
    "tasks": set(),
    "leaving": set(),
    "__main__": {"cli"},
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
    "sharing": LOWER | {"runtime"},
    "transformers": LOWER
    | {"transport", "network", "endpoint", "experts", "node", "runtime", "sharing", "server", "client"},
    "server": LOWER | {"transport", "network", "endpoint", "experts", "node", "runtime", "sharing"},
    "client": LOWER | {"transport", "network", "endpoint", "experts", "node", "runtime", "sharing", "leaving"},
    "shared_pieces": LOWER | {"transport", "network", "endpoint", "experts", "node", "runtime", "sharing", "server"},
    "shared_part": LOWER | {"experts", "node", "runtime", "sharing", "server", "shared_pieces"},
    "shared_entry": LOWER | {"experts", "node", "runtime", "sharing", "server", "shared_pieces"},
    "shared_parameters": LOWER
    | {"endpoint", "experts", "node", "runtime", "sharing", "server", "client"}
    | {"shared_pieces", "shared_part", "shared_entry"},
    "shared_sampler": LOWER | {"shared_pieces", "shared_parameters", "sharing"},
    "saving": LOWER
    | {"transport", "network", "endpoint", "experts", "node", "runtime", "sharing", "server", "client"}
    | {"shared_pieces", "shared_part", "shared_parameters"},
    "testing": LOWER | {"transport", "network", "endpoint", "experts", "node"},
    "monitoring": LOWER | {"transport", "network", "endpoint", "experts", "node", "runtime", "server"},
    "cli": LOWER
    | {"transport", "network", "endpoint", "nat", "experts", "node", "runtime", "server", "client", "testing"}
    | {"monitoring", "leaving", "transformers", "saving", "shared_pieces"},
}
# TesseractNode.get_expert returns a RemoteExpert: the one arrow that points up, taken when it is called.
EXCEPTIONS = {("node.py", "client")}

# A file that imports none of these is pure: it takes bytes and time, and gives bytes and events.
IMPURE_MODULES = {"asyncio", "socket", "threading", "time", "concurrent"}
# Rooms of pure machines: every file in them is pure, except their drivers.
DRIVERS = {
    "errors": set[str](),
    "metrics": set[str](),
    "identity": set[str](),
    "admission": set[str](),
    "wire": set[str](),
    "network": {"network/driver.py", "network/network.py", "network/presence.py"},
    "endpoint": {
        "endpoint/connection.py",
        "endpoint/dialing.py",
        "endpoint/endpoint.py",
        "endpoint/handlers.py",
        "endpoint/handshake.py",
    },
    "sharing": set[str](),
    "testing": set[str](),
}
# Elsewhere, the files that decide.
MUST_BE_PURE = {
    "transport/throttle.py",
    "transport/tls.py",
    "transport/token_bucket.py",
    "nat/offers.py",
    "nat/preamble.py",
    "nat/webrtc/message_stream.py",
    "experts/authority.py",
    "experts/choice.py",
    "experts/grants.py",
    "experts/grid.py",
    "experts/lineage.py",
    "experts/manifest.py",
    "experts/pieces.py",
    "experts/placement.py",
    "experts/run.py",
    "experts/signed.py",
    "experts/tenure.py",
    "runtime/batcher.py",
    "runtime/costs.py",
    "runtime/norms.py",
    "server/contract.py",
    "server/parts.py",
    "client/beam_search.py",
    "client/blocks.py",
    "client/dispatch.py",
    "client/grouping.py",
    "client/latency.py",
    "cli/swarm_picture.py",
}
THREADS_ALLOWED = {"runtime/runtime.py", "runtime/wake_ups.py", "client/background.py"}
# Torch's engine runs in threads, which wait for what the loop brings.
THREADS_ALLOWED |= {"client/engine_threads.py", "client/gradient_requests.py"}
# The codecs of large tensors only, functions that share nothing: their threads are not the loop's default executor.
THREADS_ALLOWED |= {"runtime/encoding.py"}
# A loader asks for samples in a thread of its own, and waits there for what the loop brings.
THREADS_ALLOWED |= {"shared_sampler.py"}
# A follower of a mesh hands out its state, and ends with its leader, whatever its main thread waits for.
THREADS_ALLOWED |= {"runtime/mesh_link.py"}
WITHOUT_TORCH = ("network", "endpoint", "transport", "nat", "identity")


@cache
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


def named(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_point_one_way() -> None:
    wrong = []
    for path in files():
        here = room(path)
        for name in imported(path) if path != PACKAGE / "__init__.py" else ():
            parts = name.split(".")
            if parts[0] == "tesseract_async" and parts[1:] not in ([], ["__version__"]) and parts[1] != here:
                if parts[1] not in MAY_IMPORT[here] and (path.name, parts[1]) not in EXCEPTIONS:
                    wrong.append(f"{named(path)} imports {name}")
    assert not wrong


def is_pure(path: Path) -> bool:
    return not {module.split(".")[0] for module in imported(path)} & IMPURE_MODULES


def test_files_that_decide_are_pure() -> None:
    known = {named(path): is_pure(path) for path in files()}
    drivers = set().union(*DRIVERS.values())
    held = MUST_BE_PURE | {named(path) for path in files() if room(path) in DRIVERS} - drivers
    assert held | drivers <= known.keys(), "a file was moved: the lists above name it"
    assert not {name for name in held if not known[name]}
    assert not {name for name in drivers if known[name]}, "these are pure now: they are no drivers"


def test_a_file_that_claims_purity_is_pure() -> None:
    def claims(path: Path) -> bool:
        claim = ast.get_docstring(ast.parse(path.read_text())) or ""
        return path.name != "__init__.py" and bool(re.search(r"\b(Pure|No I/O)\b|\ba pure machine\b", claim))

    assert not [named(path) for path in files() if claims(path) and not is_pure(path)]


def test_no_two_files_import_each_other() -> None:
    """Not through others either, and not for type checking."""
    modules = {module_name(path): path for path in files()}
    graph = {name: set(map(owner(modules), imported(path))) - {None, name} for name, path in modules.items()}
    while leaves := {name for name, targets in graph.items() if not targets & graph.keys()}:
        graph = {name: targets for name, targets in graph.items() if name not in leaves}
    # what is left is a circle or leads to one: peel from the other side too, so that the circles alone are shown
    while roots := graph.keys() - set().union(*graph.values()):
        graph = {name: targets for name, targets in graph.items() if name not in roots}
    assert not graph, sorted(graph)


def module_name(path: Path) -> str:
    return ".".join(("tesseract_async", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def owner(modules: dict[str, Path]) -> Callable[[str], str | None]:
    """The file that an imported name lies in; None outside the package, and for names from `__init__` files.

    Parent packages are left out: importing one of their files imports them first in any case.
    """

    def find(name: str) -> str | None:
        found = name if name in modules else name.rpartition(".")[0]
        return found if found in modules and modules[found].name != "__init__.py" else None

    return find


def test_threads_are_crossed_in_few_files_only() -> None:
    threads = {"threading", "concurrent", "queue"}
    crossing = {named(path) for path in files() if {module.split(".")[0] for module in imported(path)} & threads}
    assert not crossing - THREADS_ALLOWED


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


# What the process has one of. All other state has an owner.
PROCESS_WIDE = {
    "client/gradient_requests.py": {"engine_thread", "steps"},  # PyTorch's engine, whose passes bear numbers of its own
    "client/halves.py": {"_took"},  # by kinds of its nodes
    "client/scaling.py": {"_noted"},  # the same
    "runtime/mesh_job.py": {"_links", "_on_cpu"},  # to the other processes of torch's process groups
    "runtime/encoding.py": {"_threads"},  # shared by all nodes, renewed after a fork
    "server/builders.py": {"EXPERTS", "_MARKED"},  # filled by decorators, when modules are imported
    "server/state_files.py": {"_held"},  # some file systems' locks are a process's
    "transport/channel.py": {"_blocks"},  # a buffer for each event loop, gone with it
    "transformers/operator.py": {"_calls", "_layers"},  # an operator of torch is given numbers, no objects
    "wire/frames.py": {"_packers"},  # at hand for the next message
    "wire/names.py": {"_names"},  # random numbers in store, thrown away after a fork
}
GLOBAL = re.compile(
    r"^(\w+)(?:: .+)? = "
    r"(?:\[\]|\{\}|(?:\w+\.)*(?:\w*[dD]ict(?:ionary)?|LRU|list|set|deque|local|Counter)(?:\[.*\])?\(.*\))$"
    r"|^ +global (\w+)$",
    flags=re.M,
)
"""A name of a module that holds something which is there to be filled, or that a function binds again."""


def test_nodes_of_one_process_share_no_state_but_what_is_listed() -> None:
    found = {named(path): {one or other for one, other in GLOBAL.findall(path.read_text())} for path in files()}
    assert {name: names for name, names in found.items() if names} == PROCESS_WIDE


def test_no_two_things_have_one_name() -> None:
    """Classes and aliases of types, private ones included; type variables and what others import again aside."""
    places: dict[str, list[str]] = {}
    for path in files():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(named(path))
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name, value = node.targets[0].id, ast.unparse(node.value)
                if re.fullmatch(r"[A-Z]+[a-z]\w*", name) and not value.startswith("TypeVar("):
                    places.setdefault(name, []).append(named(path))
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_no_function_is_imported_under_a_name_that_another_bears() -> None:
    places: dict[str, set[str]] = {}
    defined: dict[str, set[str]] = {}
    for path in files():
        body = ast.parse(path.read_text()).body
        functions = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        defined[module_name(path)] = functions
    for path in files():
        for name in imported(path):
            module, _, function = name.rpartition(".")
            if function in defined.get(module, ()):
                places.setdefault(function, set()).add(module)
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_little_is_typed_as_anything() -> None:
    """`Any` is for what torch and other libraries leave untyped: in 3 of 1,000 lines at most."""
    texts = [path.read_text() for path in files()]
    used = sum(isinstance(one, ast.Name) and one.id == "Any" for text in texts for one in ast.walk(ast.parse(text)))
    assert 1000 * used <= 3 * sum(text.count("\n") for text in texts)
