"""`tesseract doctor`: what on this machine would keep it from taking part, each with what to do."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import json
import shutil
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click

from tesseract_async.cli.options import host_towards, peers
from tesseract_async.cli.running import run
from tesseract_async.cli.units import counted
from tesseract_async.cli.waiting import sign

MIN_FREE_BYTES = 10**9
MIN_OPEN_FILES = 1024
MAX_CLOCK_OFFSET = 5.0

Verdict = Literal["good", "note", "bad"]
MARKS = {"good": "ok  ", "note": "note", "bad": "BAD "}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `advice` is empty where all is well."""

    verdict: Verdict
    what: str
    found: str
    advice: str = ""


@click.command("doctor")
@click.option("--initial-peers", "-p", multiple=True, metavar="HOST:PORT[/PEER_ID]", help="Try to reach these, too.")
@click.option(
    "--host",
    help="Address that a node would listen on; by default loopback, or 0.0.0.0 (::) where a seed is elsewhere.",
)
@click.option("--port", default=0, type=click.IntRange(0, 65535), help="Port that a node would listen on.")
@click.option(
    "--upnp",
    is_flag=True,
    help="Ask the router to let others in, as a node with --upnp would, and see whether that helps.",
)
@click.option(
    "--checkpoint-dir", default=".", type=click.Path(file_okay=False, path_type=Path), help="Look for room there."
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON per finding.")
def command(
    initial_peers: tuple[str, ...], host: str | None, port: int, upnp: bool, checkpoint_dir: Path, as_json: bool
) -> None:
    """Look for what would keep this machine from taking part, and say what to do about it.

    The exit status is 1 if something is bad; notes do not count.
    """

    async def main() -> int:
        seeds = peers(initial_peers)
        here = host_towards(seeds) if host is None else host
        listening = await port_pair(here, port)
        findings = [*software(), *room(checkpoint_dir), listening]
        for finding in findings:
            _show(finding, as_json)
        if not initial_peers:
            advice = "It takes another node to see them: give the address of one by --initial-peers."
            _show(Finding("note", "clock and NAT", "not looked at", advice), as_json)
        for peer in seeds:
            with sign(f"asking {peer}"):
                # a port that is taken (by the very node in question, perhaps) can't be tried; another tells the rest
                free = port if listening.verdict == "good" else 0
                asked = [finding async for finding in reach(peer, here, free, upnp=upnp)]
            findings += asked
            for finding in asked:
                _show(finding, as_json)
        worst = sum(finding.verdict == "bad" for finding in findings)
        return 1 if worst else 0

    run(main)


def _show(finding: Finding, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(finding)))
        return
    click.echo(f"{MARKS[finding.verdict]}  {finding.what}: {finding.found}")
    if finding.advice:
        click.echo(f"      {finding.advice}")


def software() -> Iterator[Finding]:
    """Python (that it is new enough, pip saw to), PyTorch and its devices, and the packages that some commands want."""
    yield Finding("good", "Python", ".".join(map(str, sys.version_info[:3])))
    if importlib.util.find_spec("torch") is None:
        yield Finding(
            "bad", "PyTorch", "missing", "pip install torch: experts and trainers need it (`tesseract dht` does not)."
        )
    else:
        import torch

        yield Finding("good", "PyTorch", torch.__version__)
        if torch.cuda.is_available():
            names = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
            yield Finding("good", "CUDA", names)
        else:
            yield Finding("note", "CUDA", "no device", "Experts will run on the CPU.")
    if sys.platform != "win32" and importlib.util.find_spec("uvloop") is None:
        yield Finding("note", "uvloop", "missing", "pip install uvloop: the event loop is faster with it.")
    for extra, modules in {"demo": ("matplotlib", "sklearn"), "dashboard": ("aiohttp", "prometheus_client")}.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if missing:
            advice = f"`pip install -e '.[{extra}]'` in the clone, if you want `tesseract {extra}`."
            yield Finding("note", f"for `tesseract {extra}`", f"{', '.join(missing)} missing", advice)


def room(folder: Path) -> Iterator[Finding]:
    """Disk for checkpoints, and open files."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    advice = (
        ""
        if free >= MIN_FREE_BYTES
        else "Checkpoints hold weights and optimizer states: make room, or choose another --checkpoint-dir."
    )
    yield Finding("note" if advice else "good", "disk", f"{free / 1e9:.1f} GB free at {existing}", advice)
    try:
        import resource
    except ImportError:  # not POSIX: there is no such limit
        return
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    enough = limit >= MIN_OPEN_FILES or limit == resource.RLIM_INFINITY
    advice = "" if enough else f"A busy node holds many connections: ulimit -n {MIN_OPEN_FILES}"
    yield Finding("good" if enough else "note", "open files", f"at most {limit}", advice)


async def port_pair(host: str, port: int) -> Finding:
    """Whether a node could listen: TCP and UDP on one port."""
    from tesseract_async.node import bind_pair

    where = f"{host or 'every address'} port {port or '(any)'}"
    try:
        for sock in await bind_pair(host, port):
            sock.close()
    except OSError as error:
        advice = "Choose another --port (0 takes a free one), or a --host that is an address of this machine."
        return Finding("bad", "listening", f"not possible at {where}: {error.strerror or error}", advice)
    return Finding("good", "listening", f"possible at {where}, TCP and UDP")


async def reach(peer: str, host: str, port: int, *, upnp: bool) -> AsyncIterator[Finding]:
    """Whether this seed answers by UDP and by TCP, how far the clocks differ, and what others see of `port` here."""
    from tesseract_async.errors import NotAllowed, TesseractError, describe
    from tesseract_async.monitoring import ask_status
    from tesseract_async.node import TesseractNode

    async with TesseractNode(host, port, initial_peers=[peer], upnp=upnp) as node:
        if not await node.network.wait_joined(5.0):
            advice = "Does it run? Is UDP to its port let through, here and there?"
            if node.network.wrong_seeds:
                yield Finding("bad", f"seed {peer}", node.network.trouble or "", "Ask who runs it for its peer id.")
            else:
                yield Finding("bad", f"seed {peer}", "no answer by UDP in 5 s", advice)
            return
        yield Finding("good", f"seed {peer}", f"answers by UDP; {counted(node.network.num_contacts, 'contact')}")
        address = node.initial_peers[0]
        started, before = asyncio.get_running_loop().time(), time.time()
        try:
            status = await ask_status(node, address, timeout=5.0)
        except NotAllowed as error:
            advice = "TCP is let through. A node with an identity that its owner listed may still be answered."
            yield Finding("note", f"seed {peer}", f"answers by TCP, and refuses: {describe(error)}", advice)
            return
        except (TesseractError, TimeoutError) as error:
            yield Finding(
                "bad", f"seed {peer}", f"no answer by TCP: {describe(error)}", "Is TCP to its port let through?"
            )
            return
        seconds = asyncio.get_running_loop().time() - started
        yield Finding("good", f"seed {peer}", f"answers by TCP in {1000 * seconds:.0f} ms, version {status.software}")
        offset = status.time - (before + seconds / 2)
        far = abs(offset) > MAX_CLOCK_OFFSET
        advice = "Records expire by the clock: synchronise it (NTP)." if far else ""
        yield Finding("bad" if far else "good", "clock", f"{offset:+.1f} s from that of {peer}", advice)
        known = await node.wait_reachable(15.0)
        found, *advised = node.reach.report()
        reached = node.reach.reachability.role == "public" or not node.reach.enabled
        yield Finding("good" if known and reached else "note", "seen from outside", found, " ".join(advised))
