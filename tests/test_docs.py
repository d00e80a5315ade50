"""The documents stay true: what they tell to do is done, and what they show is what is seen.

README and tutorial are followed command by command (`docs/session.py`), how-to pages are run where that needs nothing
but this computer, and else checked by the tools that would read them, and against the real command line.
"""

import ast
import asyncio
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import click
import pytest
import torch
from torch.distributed.run import get_args_parser

import tesseract_async as ta
from tesseract_async.cli.config_file import read_config
from tesseract_async.cli.main import COMMANDS, main
from tesseract_async.monitoring.catalogue import METRICS
from tests import manifests
from tests.stem import Stem

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(page for page in sorted(DOCS.rglob("*.md"))),
]
GENERATED = ("commands.md", "configuration.md", "metrics.md", "settings.md")
PAGES = [page for page in PAGES if page.name not in GENERATED]
FOLLOWED = [ROOT / "README.md", *sorted((DOCS / "tutorial").glob("*.md"))]


def script(name: str) -> ModuleType:
    """A Python file of the documents as a module."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, DOCS / f"{name.removeprefix('docs_')}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


session = script("docs_session")
generate = script("docs_generate")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str, title: str | None = None) -> list[str]:
    found = re.findall(rf'^```{language}(?: title="([^"]*)")?\n(.*?)^```', text_of(page), flags=re.S | re.M)
    return [body for name, body in found if title in (None, name)]


def check(words: list[str]) -> None:
    """Whether the command line takes these words, which begin with ``tesseract``."""
    if len(words) == 1 or words[1].startswith("-"):
        return
    assert words[1] in COMMANDS, words
    command: click.Command = main
    rest = words[1:]
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), rest[0])
        assert found is not None, words
        command, rest = found, rest[1:]
    context = click.Context(command, info_name=words[1])
    _, left, _ = command.make_parser(context).parse_args(list(rest))
    assert left == [], f"{shlex.join(words)}: nobody takes {left}"


def check_shell(text: str) -> int:
    """Checks every call of `tesseract` in a shell script; how many there are."""
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    num_found = 0
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        words = shlex.split(line, comments=True)
        for word in words:
            if " " in word and "tesseract " in word:
                num_found += check_shell(word)
        for at, word in enumerate(words[:-1]):
            # the command, at whatever path, or the container's image in front of what it is given
            if word.removeprefix("/opt/tesseract/bin/") in ("tesseract", "tesseract-async") and words[at + 1].isalpha():
                check(["tesseract", *words[at + 1 :]])
                num_found += 1
                break
    return num_found


# -- every page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
        if "://" not in target:
            assert target.endswith(GENERATED) or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    for name in re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.py)`", text_of(page)):
        assert (ROOT / "tesseract_async" / name).exists() or (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_blocks_are_what_they_say(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for block in blocks(page, "sh") + blocks(page, "bash"):
        check_shell(block)


def test_the_readme_of_the_package_leads_out_of_the_package() -> None:
    metadata, text = script("docs_metadata"), text_of(ROOT / "README.md")
    whole = metadata.readme(text, "https://code.example/tesseract")
    targets = set(re.findall(r"\]\(([^)\s]+)\)", whole))
    assert targets and all(target.startswith("https://") for target in targets)
    assert "https://code.example/tesseract/raw/main/docs/images/demo.png" in targets
    assert "https://code.example/tesseract/blob/main/README.md#limits" in targets
    bare = metadata.readme(text, "")
    assert "docs/images" not in bare and "](docs/" not in bare and "](examples/" not in bare
    assert "[`examples/quickstart.py`" not in bare and "`examples/quickstart.py`" in bare
    assert metadata.urls("") == {} and all(url.startswith("https:") for url in metadata.urls("https://x").values())


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    pages = {str(page.relative_to(DOCS)) for page in PAGES if DOCS in page.parents}
    assert listed == pages | {f"reference/{name}" for name in GENERATED}


# -- README and tutorial -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", FOLLOWED, ids=named)
def test_every_block_of_readme_and_tutorial_is_seen(page: Path) -> None:
    for piece in session.read_pieces(text_of(page)):
        assert piece.kind in ("sh", "text", "stop", "kill", "run") or piece.title or page.name == "README.md", piece
    for command in session.NOT_RUN:
        if command.startswith("make "):
            assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), flags=re.M)


LONG = ("own-data.md", "own-expert.md", "second-computer.md")
"""Pages that are followed in the longer run only."""


@pytest.mark.parametrize(
    "page", [pytest.param(one, marks=[pytest.mark.slow] * (one.name in LONG), id=named(one)) for one in FOLLOWED]
)
async def test_what_readme_and_tutorial_show_is_what_is_seen(page: Path, stem: Stem) -> None:
    """Run `python docs/session.py` where an output has changed, and look at what it has written."""
    shown = text_of(page)
    seen = await session.follow(shown, stem)
    assert [session.shape(one) for one in _outputs(seen)] == [session.shape(one) for one in _outputs(shown)]


def _outputs(text: str) -> list[str]:
    return [piece.body for piece in session.read_pieces(text) if piece.kind == "text"]


def test_only_figures_may_differ_from_an_output_that_is_shown() -> None:
    shown = "step 10: loss 1.25\n8 experts at 127.0.0.1:31337/" + 64 * "a1"[:1] + "\n"
    assert session.shape(shown) == session.shape(shown.replace("1.25", "0.9"))
    assert session.shape(shown) != session.shape(shown.replace("loss", "error"))


async def test_python_of_the_readme_runs() -> None:
    async with hosting("ffn.3.8", width=1024) as host:
        for block in blocks(ROOT / "README.md", "python"):
            names = {"ta": ta, "torch": torch, "x": torch.randn(2, 1024), "loss": lambda y: y.square().mean()}
            await execute(at_home(block).replace("198.51.100.7:31337", host.address), names)


def at_home(code: str) -> str:
    """What a page does on every interface, on loopback."""
    return code.replace('host="0.0.0.0"', 'host="127.0.0.1"')


async def execute(code: str, names: dict[str, Any]) -> None:
    result = eval(compile(code, "documents", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
    if result is not None:
        await result


@asynccontextmanager
async def hosting(uid: str, *, width: int) -> AsyncIterator[ta.TesseractNode]:
    """A swarm of one node that hosts one expert."""
    backend = ta.ExpertBackend(torch.nn.Linear(width, width), args_schema=(ta.TensorSpec((width,)),))
    async with ta.TesseractNode() as host, ta.TesseractServer(host, {uid: backend}):
        yield host


InASwarm = Callable[[int], AbstractAsyncContextManager[None]]


@pytest.fixture
def in_a_swarm(monkeypatch: pytest.MonkeyPatch) -> InASwarm:
    """A swarm of one node that hosts ``ffn.3.7``, of a width; the programs of the pages find it in the environment."""

    @asynccontextmanager
    async def make(width: int) -> AsyncIterator[None]:
        async with hosting("ffn.3.7", width=width) as host:
            monkeypatch.setenv("SWARM", host.address)
            yield

    return make


# -- how-to ----------------------------------------------------------------------------------------------------------


def app_of(framework: str) -> Any:
    [block] = [block for block in blocks(DOCS / "how-to/embed.md", "python", "app.py") if framework in block]
    names: dict[str, Any] = {"__name__": "app"}
    exec(compile(at_home(block).replace("from __future__", "# "), "app.py", "exec"), names)
    return names["app"]


async def test_a_fastapi_application_holds_a_node(in_a_swarm: InASwarm) -> None:
    pytest.importorskip("fastapi")
    async with in_a_swarm(4):
        app = app_of("fastapi")
        async with app.router.lifespan_context(app):
            status, body = await asgi_post(app, "/apply", [[1, 2, 3, 4]])
            assert status == 200 and len(body[0]) == 4
            status, body = await asgi_post(app, "/apply", [[1]])
            assert status == 400 and "float32[rows, 4]" in body["detail"]


async def asgi_post(app: Any, path: str, data: Any) -> tuple[int, Any]:
    """One request, as a web server hands it to an application."""
    sent: list[dict[str, Any]] = []
    asked = iter([{"type": "http.request", "body": json.dumps(data).encode()}])

    async def receive() -> dict[str, Any]:
        return next(asked)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b"", "asgi": {}}
    await app(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], json.loads(body)


async def test_an_aiohttp_application_holds_a_node(in_a_swarm: InASwarm) -> None:
    from aiohttp.test_utils import TestClient, TestServer

    async with in_a_swarm(4):
        async with TestClient(TestServer(app_of("aiohttp"))) as client:
            answer = await client.post("/apply", json=[[1, 2, 3, 4]])
            assert len((await answer.json())[0]) == 4


async def test_a_program_without_a_loop_uses_an_expert(
    in_a_swarm: InASwarm, capsys: pytest.CaptureFixture[str]
) -> None:
    [plain] = blocks(DOCS / "how-to/embed.md", "python", "plain.py")
    async with in_a_swarm(16):
        await asyncio.to_thread(exec, compile(at_home(plain), "plain.py", "exec"), {})
    assert capsys.readouterr().out == "torch.Size([4, 16])\n"


async def test_the_cells_of_the_notebook_run(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    for block in blocks(DOCS / "how-to/notebook.md", "python"):
        await execute(block, names)
    shown = re.search(r"from ([\d.]+) to ([\d.]+)", capsys.readouterr().out)
    assert shown and float(shown[2]) < 0.25 * float(shown[1]), "it learns"


async def test_a_swarm_is_rehearsed(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(DOCS / "how-to/rehearse.md", "python"):
        await execute(block, names)
    lines = capsys.readouterr().out.splitlines()
    print(*lines, sep="\n")
    first = re.fullmatch(r"16 of 16 servers found in (\d\.\d\d) s", lines[0])
    assert first and float(first[1]) < 2.0
    assert lines[1].startswith("16 of 16 servers are still known")
    assert lines[2:5] == ["20 of 20 have joined", "{'client'}", "true"]
    assert re.match(r"\d+ bytes per second and node, \d+ datagrams", lines[5])


@pytest.mark.slow
async def test_a_server_for_each_device_in_one_program(capsys: pytest.CaptureFixture[str]) -> None:
    [block] = blocks(DOCS / "how-to/gpus.md", "python")
    names: dict[str, Any] = {}
    exec(compile(block.rpartition("asyncio.run")[0], "gpus.py", "exec"), names)
    await names["main"](["cpu", "cpu"])
    assert capsys.readouterr().out == "torch.Size([2, 64])\n"


def test_the_systemd_unit_is_one(tmp_path: Path) -> None:
    page = DOCS / "how-to/systemd.md"
    [unit] = blocks(page, "ini")
    [config] = blocks(page, "toml")
    (tmp_path / "tesseract.toml").write_text(config)
    serve = main.get_command(click.Context(main), "serve")
    assert serve is not None
    assert read_config(tmp_path / "tesseract.toml", serve)["port"] == 31337
    assert check_shell(re.findall(r"^ExecStart=(.*)", unit, flags=re.M)[0]) == 1
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("systemd-analyze is not installed; the command line was checked")
    file = tmp_path / "tesseract.service"
    file.write_text(unit.replace("/opt/tesseract/bin/tesseract", "/bin/true"))
    found = subprocess.run([verify, "verify", "--man=no", str(file)], capture_output=True, text=True)
    said = [line for line in found.stderr.splitlines() if file.name in line]
    assert said == [], found.stderr


def test_the_container_file_starts_what_there_is() -> None:
    [text] = blocks(DOCS / "how-to/container.md", "dockerfile")
    steps = [line.partition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    known = "FROM RUN COPY USER WORKDIR VOLUME EXPOSE STOPSIGNAL ENTRYPOINT CMD".split()
    assert all(step in known for step, _, _ in steps) and steps[0][0] == "FROM"
    given = {step: rest for step, _, rest in steps}
    check([*json.loads(given["ENTRYPOINT"]), *json.loads(given["CMD"])])
    for _, _, rest in (step for step in steps if step[0] == "RUN"):
        subprocess.run(["bash", "-n"], input=rest, text=True, check=True)
    extras = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in extras for extra in re.findall(r"/src\[(\w+)\]", text))
    assert (ROOT / "constraints.txt").exists() and "constraints.txt" in text


def test_the_kubernetes_manifest_starts_what_there_is() -> None:
    yaml = pytest.importorskip("yaml")
    [text] = blocks(DOCS / "how-to/kubernetes.md", "yaml")
    manifest = yaml.safe_load(text)
    assert (manifest["apiVersion"], manifest["kind"]) == ("apps/v1", "StatefulSet")
    spec = manifest["spec"]
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    [container] = spec["template"]["spec"]["containers"]
    check(["tesseract", *container["args"]])
    used = {name for word in container["args"] for name in re.findall(r"\$\((\w+)\)", word)}
    assert used == {variable["name"] for variable in container["env"]}
    claimed = {claim["metadata"]["name"] for claim in spec["volumeClaimTemplates"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == claimed
    [dockerfile] = blocks(DOCS / "how-to/container.md", "dockerfile")
    assert f"VOLUME {container['volumeMounts'][0]['mountPath']}" in dockerfile


def test_the_slurm_script_starts_what_there_is() -> None:
    [text] = blocks(DOCS / "how-to/slurm.md", "bash")
    assert text.startswith("#!/bin/bash\n#SBATCH ")
    assert check_shell(text) == 1


def check_torchrun(words: list[str]) -> Any:
    """Whether torchrun and `tesseract` take these words. Returns torchrun's options."""
    options = get_args_parser().parse_args([*words, "--run", "name"])  # which torchrun could take for its own
    assert options.training_script_args[-2:] == ["--run", "name"]
    assert options.module and options.training_script == "tesseract_async.cli"
    check(["tesseract", *options.training_script_args])
    left = next(one for one in options.training_script_args if one.startswith("--leave-within"))
    assert left in ("--leave-within=20s", "--leave-within")  # less than the 30 s that torchrun waits
    return options


def test_a_mesh_is_started_by_words_that_torchrun_and_serve_take() -> None:
    page = DOCS / "how-to/larger-than-a-device.md"
    scripts = blocks(page, "sh") + blocks(page, "bash")
    found = [line for text in scripts for line in re.sub(r"\\\n\s*", " ", text).splitlines() if "cli.torchrun " in line]
    for line in found:
        words = shlex.split(line.replace("$SLURM_NNODES", "2"), comments=True)
        check_torchrun(words[words.index("tesseract_async.cli.torchrun") + 1 :])
    assert len(found) == 2 and check_shell("\n".join(scripts)) == 0


def test_the_manifest_of_a_mesh_fits_its_schema() -> None:
    yaml = pytest.importorskip("yaml")
    [text] = blocks(DOCS / "how-to/larger-than-a-device.md", "yaml")
    manifest = yaml.safe_load(text)
    manifests.check(manifest, manifests.JOBSET)
    with pytest.raises(AssertionError, match="completionMod"):  # it would be noticed
        manifests.check(yaml.safe_load(text.replace("completionMode", "completionMod")), manifests.JOBSET)
    spec = manifest["spec"]
    [replicated] = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert container["command"][:3] == ["python", "-m", "tesseract_async.cli.torchrun"]
    options = check_torchrun(container["command"][3:])
    # each pod's torchrun finds the first pod by the name that JobSet gives it
    assert job["parallelism"] == job["completions"] == int(options.nnodes)
    host, port = options.rdzv_endpoint.split(":")
    assert host == f"{manifest['metadata']['name']}-{replicated['name']}-0-0.{spec['network']['subdomain']}"
    assert [one["containerPort"] for one in container["ports"]] == [int(port)]
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    assert pod["terminationGracePeriodSeconds"] > 30


PUBLIC_NAMES_OF_OTHERS = """
    DecentralizedAverager DHT ModuleBackend RemoteExpert RemoteMixtureOfExperts RemoteSwitchMixtureOfExperts Server
    register_expert_class GradScaler Optimizer TrainingAverager background_server declare_experts get_experts DHTNode
    DHTID DHTValue P2P P2PContext P2PDaemonError P2PHandlerError PeerID PeerInfo ServicerBase StubBase get_dht_time
    TensorDescriptor MSGPackSerializer SizeAdaptiveCompression BLOCKWISE_8BIT hivemind-dht hivemind-server
    TesseractNetwork TesseractServer TesseractRuntime ExpertBackend GatingFunction TaskPool BatchTensorProto
    SharedFuture run_and_await_k PickleSerializer map_with_parallel_backward first_k_active
""".split()
"""What hivemind 1.1.12 and the original Tesseract 0.7.1 export."""


def test_each_name_of_the_others_has_its_like_or_a_word_why_not() -> None:
    page = text_of(DOCS / "how-to/migrate.md")
    rows = [line.strip("|").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    theirs, ours = " ".join(row[0] for row in rows), " ".join(row[1] for row in rows if len(row) == 2)
    assert [name for name in PUBLIC_NAMES_OF_OTHERS if not re.search(rf"\b{name}\b", theirs)] == []
    package = "".join(text_of(path) for path in sorted((ROOT / "tesseract_async").rglob("*.py")))
    promised = set(re.findall(r"`(?:ta\.)?([A-Z]\w+)[(`]", ours)) - {"PEER_ID"}
    assert [name for name in sorted(promised) if f"class {name}" not in package] == []


# -- reference -------------------------------------------------------------------------------------------------------


def test_pages_that_follow_from_the_code_are_whole() -> None:
    commands, configuration = generate.commands(), generate.configuration()
    assert all(f"## tesseract {name}\n" in commands for name in COMMANDS)
    assert "`--host`" in configuration and "TESSERACT_SERVE_HOST" in configuration
    assert "tesseract_expert_calls_total` | counter | calls | `method` |" in generate.metrics()
    assert "::: tesseract_async.runtime.backend.BackendSettings" in generate.settings()


def test_pages_that_are_written_have_no_source_to_edit() -> None:
    for name, link in (("reference/commands.md", None), ("index.md", "edit/main")):
        page = SimpleNamespace(file=SimpleNamespace(src_uri=name), edit_url="edit/main")
        assert generate.on_pre_page(page, config=None, files=None).edit_url == link


def test_each_metric_has_a_meaning_and_each_meaning_a_metric() -> None:
    assert generate.counted().keys() == METRICS.keys()


def test_every_public_name_is_in_the_reference() -> None:
    pages = "".join(text_of(page) for page in (DOCS / "reference").glob("*.md")) + generate.settings()
    listed = re.findall(r"^::: (tesseract_async[\w.]*)$", pages, flags=re.M)
    for path in listed:
        module, _, name = path.rpartition(".")
        found = importlib.import_module(path) if name.islower() and _is_module(path) else _of(module, name)
        assert found is not None, path
    for name in ta.__all__:
        home = getattr(ta, name)
        path = home.__name__ if isinstance(home, ModuleType) else f"{home.__module__}.{home.__qualname__}"
        assert path in listed, path
        assert (home.__doc__ or "").strip(), f"{name} has no docstring"


def _is_module(path: str) -> bool:
    return importlib.util.find_spec(path.rpartition(".")[0]) is not None and _find(path)


def _find(path: str) -> bool:
    try:
        return importlib.util.find_spec(path) is not None
    except ModuleNotFoundError:
        return False


def _of(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)], cwd=ROOT, check=True)
    assert (tmp_path / "reference/python/index.html").exists()
