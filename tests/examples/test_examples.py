"""The examples do what their first lines promise, run as a user runs them."""

import asyncio
import importlib.util
import re
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType

import pytest

from tests.stem import Process, Stem

EXAMPLES = Path(__file__).parents[2] / "examples"


async def start(stem: Stem, name: str, *arguments: str) -> Process:
    """An example as a user starts it, but that a warning is an error."""
    environment = {"PYTHONPATH": str(EXAMPLES.parent), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return await stem.start(
        str(EXAMPLES / name), *arguments, folder=EXAMPLES.parent, environment=environment, strict=True
    )


async def finish(process: Process, *, status: int = 0) -> str:
    out, err = await process.communicate()
    assert process.returncode == status, err.decode()
    assert b"Traceback" not in err, err.decode()
    return out.decode()


def list_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@asynccontextmanager
async def serving(stem: Stem, *arguments: str, how: signal.Signals) -> AsyncIterator[str]:
    """The address of a running `volunteer_server.py`, which is told to leave at the end."""
    server = await start(stem, "volunteer_server.py", *arguments)
    try:
        assert server.stdout is not None
        line = (await server.stdout.readline()).decode()
        found = re.search(r"--initial-peers (\S+)", line)
        assert found, (line, await finish(server))
        yield found[1]
        server.send_signal(how)
        await finish(server, status=128 + how)
    finally:
        if server.returncode is None:
            server.kill()
            await server.wait()


async def test_quickstart(stem: Stem) -> None:
    text = (EXAMPLES / "quickstart.py").read_text()
    assert len([line for line in text.splitlines() if line.strip()]) <= 20
    assert "\nta.run(main())" in text, "Ctrl-C ends it without a traceback"
    shown = await finish(await start(stem, "quickstart.py"))
    found = re.search(r"loss after 100 steps: ([\d.]+); gradient of the input: \(4, 8\)", shown)
    assert found and float(found[1]) < 0.9


@pytest.mark.parametrize("name", ["volunteer_server.py", "embed_in_web_app.py"])
async def test_a_port_in_use_is_a_sentence(stem: Stem, name: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = await start(stem, name, "--port", str(taken.getsockname()[1]))
        _, err = await process.communicate()
    assert process.returncode == 1
    assert err.decode().startswith(f"{name}: ") and "in use" in err.decode()
    assert b"Traceback" not in err


async def test_a_peer_that_is_no_address_is_a_sentence(stem: Stem) -> None:
    process = await start(stem, "volunteer_trainer.py", "--initial-peers", "nonsense")
    _, err = await process.communicate()
    assert process.returncode == 1
    assert err.decode() == "volunteer_trainer.py: not an address (host:port, or [v6]:port): 'nonsense'\n"


async def test_a_trainer_trains_what_a_volunteer_hosts(stem: Stem, tmp_path: Path) -> None:
    async with serving(stem, "--checkpoint-dir", str(tmp_path), how=signal.SIGHUP) as first:
        shown = await finish(await start(stem, "volunteer_trainer.py", "--initial-peers", first, "--steps", "60"))
        losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", shown)]
        assert len(losses) == 6
        assert losses[-1] < 0.97 * losses[0]
    assert len(list_files(tmp_path)) >= 16, "leaving saves the experts"


@pytest.mark.slow
async def test_a_web_application_leaves_by_every_signal(stem: Stem) -> None:
    for how in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process = await start(stem, "embed_in_web_app.py", "--port", "0")
        assert b"Ctrl-C leaves" in await process.stdout.readline()
        process.send_signal(how)
        await finish(process, status=128 + how)


@pytest.mark.both_loops
async def test_a_web_application_owns_the_loop() -> None:
    from aiohttp.test_utils import TestClient, TestServer

    example = load("embed_in_web_app")
    async with TestClient(TestServer(example.make_app(example.parse([])))) as client:
        rows = [[1.0, 2.0, 3.0, 4.0]]
        answers = await asyncio.gather(*(client.post("/apply", json={"rows": rows}) for _ in range(20)))
        bodies = [await answer.json() for answer in answers]
        assert len(bodies[0]["rows"][0]) == 4
        # which requests share a batch is chance, and with it the last digit
        assert all(body["rows"][0] == pytest.approx(bodies[0]["rows"][0], rel=1e-5) for body in bodies)
        wrong = await client.post("/apply", json={"rows": [[1.0]]})
        assert wrong.status == 400
        assert "float32[rows, 4]" in await wrong.text()
        health = await (await client.get("/health")).json()
        assert len(health["peer_id"]) == 64
