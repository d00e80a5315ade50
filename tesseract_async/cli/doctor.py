"""`tesseract doctor`: finds what would keep this machine from taking part, and says what to do about it."""

import asyncio
import dataclasses
import importlib.util
import json
import shutil
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click

from tesseract_async.cli.options import JOIN_TIMEOUT, host_towards, initial_peers_option, json_option
from tesseract_async.cli.running import asynchronous, spinner
from tesseract_async.cli.types import FOLDER, PORT, counted, rate_text
from tesseract_async.errors import (
    NotAllowed,
    PeerUnreachable,
    TesseractError,
    UnknownMethod,
    UnsupportedVersion,
    sentence_of,
)
from tesseract_async.monitoring.status import NodeStatus, ask_status, measure_line
from tesseract_async.nat.interfaces import bind_pair
from tesseract_async.node import TesseractNode
from tesseract_async.transport.base import PeerAddress

MIN_FREE_BYTES = 10**9
MIN_OPEN_FILES = 1024
MAX_CLOCK_OFFSET = 5.0

Grade = Literal["good", "note", "bad"]
MARKS = {"good": "ok  ", "note": "note", "bad": "BAD "}


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check. `advice` is empty where all is well."""

    verdict: Grade
    what: str
    found: str
    advice: str = ""
    rates: tuple[float, float] | None = None
    """Bytes per second that can be sent and received, where that was measured."""


@click.command("doctor")
@initial_peers_option(help_text="Try to reach this node, too")
@click.option(
    "--host",
    help="Check whether a node can listen on this address; by default 127.0.0.1, or all addresses if a node to "
    "reach is elsewhere.",
)
@click.option("--port", default=0, type=PORT, help="Check whether a node can listen on this port; 0 takes a free one.")
@click.option("--upnp", is_flag=True, help="Ask the router to let connections in, and check whether that helps.")
@click.option("--checkpoint-dir", default=".", type=FOLDER, help="Check the free space of this folder.")
@json_option
@asynchronous
async def command(
    *, initial_peers: tuple[str, ...], host: str | None, port: int, upnp: bool, checkpoint_dir: Path, as_json: bool
) -> int:
    """Look for what would keep this machine from taking part, and say what to do about it.

    The exit status is 1 if something is bad; notes do not count.
    """
    verdicts = set()
    async for check in examine(initial_peers, host=host, port=port, upnp=upnp, checkpoint_dir=checkpoint_dir):
        verdicts.add(check.verdict)
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(check)))
            continue
        click.echo(f"{MARKS[check.verdict]}  {check.what}: {check.found}")
        if check.advice:
            click.echo(f"      {check.advice}")
    return 1 if "bad" in verdicts else 0


async def examine(
    seeds: Sequence[str], *, host: str | None, port: int, upnp: bool, checkpoint_dir: Path
) -> AsyncIterator[Check]:
    host = host_towards(seeds) if host is None else host
    listening = await port_pair(host, port)
    for check in (*software(), *room(checkpoint_dir), listening):
        yield check
    if not seeds:
        advice = "Checking them takes another node: give the address of one by --initial-peers."
        yield Check("note", "clock and NAT", "not checked", advice)
    for peer in seeds:
        with spinner(f"asking {peer}"):
            # a port that is taken, perhaps by the node in question, can't be tried: check the rest from another
            free = port if listening.verdict == "good" else 0
            asked = [check async for check in reach(peer, host, free, upnp=upnp)]
        for check in asked:
            yield check


def software() -> Iterator[Check]:
    """Check Python, PyTorch and its devices, and the packages that some commands need."""
    yield Check("good", "Python", ".".join(map(str, sys.version_info[:3])))
    if importlib.util.find_spec("torch") is None:
        yield Check(
            "bad", "PyTorch", "missing", "pip install torch: experts and trainers need it (`tesseract dht` does not)."
        )
    else:
        import torch

        yield Check("good", "PyTorch", torch.__version__)
        if torch.cuda.is_available():
            names = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
            yield Check("good", "CUDA", names)
        else:
            yield Check("note", "CUDA", "no device", "Experts will run on the CPU.")
    if sys.platform != "win32" and importlib.util.find_spec("uvloop") is None:
        yield Check("note", "uvloop", "missing", "pip install uvloop: the event loop is faster with it.")
    for extra, modules in {"demo": ("matplotlib", "sklearn"), "dashboard": ("aiohttp", "prometheus_client")}.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if missing:
            advice = f"`pip install -e '.[{extra}]'` in the clone, if you want `tesseract {extra}`."
            yield Check("note", f"for `tesseract {extra}`", f"{', '.join(missing)} missing", advice)


def room(folder: Path) -> Iterator[Check]:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    advice = (
        ""
        if free >= MIN_FREE_BYTES
        else "Checkpoints hold weights and optimizer states: make room, or choose another --checkpoint-dir."
    )
    yield Check("note" if advice else "good", "disk", f"{free / 1e9:.1f} GB free at {existing}", advice)
    try:
        import resource
    except ImportError:  # not POSIX: there is no such limit
        return
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    enough = limit >= MIN_OPEN_FILES or limit == resource.RLIM_INFINITY
    advice = "" if enough else f"A busy node holds many connections: ulimit -n {MIN_OPEN_FILES}"
    yield Check("good" if enough else "note", "open files", f"at most {limit}", advice)


async def port_pair(host: str, port: int) -> Check:
    """Check that a node could listen: TCP and UDP on one port."""
    where = f"{host or 'every address'} port {port or '(any)'}"
    try:
        for sock in await bind_pair(host, port):
            sock.close()
    except OSError as error:
        advice = "Choose another --port (0 takes a free one), or a --host that is an address of this machine."
        return Check("bad", "listening", f"not possible at {where}: {sentence_of(error)}", advice)
    return Check("good", "listening", f"possible at {where}, TCP and UDP")


async def reach(peer: str, host: str, port: int, *, upnp: bool, is_quick: bool = False) -> AsyncIterator[Check]:
    """Check that this seed answers by UDP and by TCP, how far the clocks differ, how fast the line is, and how others
    see `port` here.

    `is_quick`: without how others see it, which can take as long as all the rest.
    """
    what, peer_address = f"seed {peer}", PeerAddress.parse(peer)
    async with TesseractNode(host, port, initial_peers=[peer], upnp=upnp) as node:
        asking = asyncio.create_task(_ask(node))
        joined = await node.network.wait_joined(JOIN_TIMEOUT)
        status: NodeStatus | None = None
        error: TesseractError | TimeoutError | None = None
        try:
            status, seconds, ahead = await asking
        except (TesseractError, TimeoutError) as caught:
            error = caught
        if node.network.wrong_seeds:
            yield Check("bad", what, node.network.trouble or "", "Ask its operator for its peer id.")
            return
        if not joined:
            said = "answers by TCP" if error is None else f"nor by TCP: {_cause(error)}"
            advice = "Does it run? Is UDP to its port let through, here and there?"
            if isinstance(error, PeerUnreachable) and any(
                isinstance(one, UnsupportedVersion) for one in error.attempts.values()
            ):
                advice = "The page *Upgrade* says how."
            yield Check("bad", what, f"no answer by UDP in {JOIN_TIMEOUT:.0f} s; {said}", advice)
            return
        yield Check("good", what, f"answers by UDP; {counted(node.network.num_contacts, 'contact')}")
        if isinstance(error, UnknownMethod):  # a program's own node
            yield Check("good", what, "answers by TCP")
            return
        if isinstance(error, NotAllowed):
            advice = "TCP is let through. A node with an identity that its owner listed may still be answered."
            yield Check("note", what, f"answers by TCP, and refuses: {sentence_of(error)}", advice)
            return
        if status is None:
            assert error is not None
            yield Check("bad", what, f"no answer by TCP: {_cause(error)}", "Is TCP to its port let through?")
            return
        yield Check("good", what, f"answers by TCP in {1000 * seconds:.0f} ms, version {status.software}")
        far = abs(ahead) > MAX_CLOCK_OFFSET
        advice = "Records expire by the clock: synchronize it (NTP)." if far else ""
        yield Check("bad" if far else "good", "clock", f"{ahead:+.1f} s from that of {peer}", advice)
        sends, receives = await measure_line(node, peer_address)
        if sends is not None and receives is not None:
            found = f"sends {rate_text(sends)} to {peer}, receives {rate_text(receives)}"
            yield Check("good", "line", found, rates=(sends, receives))
        if is_quick:
            return
        known = await node.wait_reachable(15.0)
        found, *advised = node.reach.report()
        reached = node.reach.reachability.role == "public" or not node.reach.enabled
        yield Check("good" if known and reached else "note", "seen from outside", found, " ".join(advised))


def _cause(error: Exception) -> str:
    """Return why a seed was not reached. The check names the seed already."""
    attempts = error.attempts.values() if isinstance(error, PeerUnreachable) else ()
    return "; ".join(dict.fromkeys(map(sentence_of, attempts))) or sentence_of(error)


async def _ask(node: TesseractNode) -> tuple[NodeStatus, float, float]:
    """Return the seed's status, how many seconds that took, and by how many its clock is ahead. Raises: as a call."""
    started, before = asyncio.get_running_loop().time(), time.time()
    status = await ask_status(node, node.initial_peers[0], timeout=JOIN_TIMEOUT)
    seconds = asyncio.get_running_loop().time() - started
    return status, seconds, status.time - (before + seconds / 2)
