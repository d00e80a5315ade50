"""`tesseract join`: everything that it takes to get from an invite to a computer that takes part."""

import asyncio
import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import psutil

from tesseract_async.cli.doctor import Check, port_pair, reach, room
from tesseract_async.cli.options import host_towards
from tesseract_async.cli.running import spinner
from tesseract_async.cli.types import FOLDER, TEXT_OR_FILE, rate_text
from tesseract_async.experts.grants import Invite
from tesseract_async.experts.run import split_run_name
from tesseract_async.files import write_whole

MAX_UPLOAD, MAX_DOWNLOAD = 2.5e6, 12.5e6
LINE_SHARE = MEMORY_SHARE = 0.5
"""A newcomer's default contribution: bytes per second at most, and the share of the measured
line and of the memory. Little enough for a household not to notice."""
MORE = """
[when]
# hours = ["mon-fri 19:00-08:00", "sat,sun 00:00-24:00"]
# pause-above-load = "50 %"  # while other programs use more of the processors than this
# data-quota = "200 GB"  # each month
"""

UNIT = """[Unit]
Description=Tesseract: a part of the run {run}
After=network-online.target
Wants=network-online.target

[Service]
ExecStart={command}
WorkingDirectory={folder}
LimitNOFILE=65536
Restart=always
RestartSec=5
TimeoutStopSec=120
Nice=10

[Install]
WantedBy={target}
"""


@click.command("join", context_settings={"ignore_unknown_options": True})
@click.argument("invite", type=TEXT_OR_FILE)
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS OF SERVE]...")
@click.option("--folder", type=FOLDER, help="Keep key, limits and states here; by default in ~/.tesseract.")
@click.option("--install", is_flag=True, help="Let systemd run it, from now on and after every start of this computer.")
@click.option("--yes", is_flag=True, help="Start without asking.")
def command(*, invite: str, options: tuple[str, ...], folder: Path | None, install: bool, yes: bool) -> None:
    """Take part in a run with nothing but its INVITE, which the run's owner hands on.

    Looks for what would keep this computer from taking part, makes a key, says what it will lend, asks once, and then
    does what `tesseract serve` does. The limits are in serve.toml of the folder, where you may change them. Options of
    `tesseract serve`, such as --max-memory '2 GiB' or --device cuda, may follow the invite; they win over the file.
    """
    try:
        found = Invite.parse(invite)
        name, owner = split_run_name(found.run)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    if found.not_after is not None and found.not_after <= time.time():
        ended = time.strftime("%Y-%m-%d", time.localtime(found.not_after))
        raise click.ClickException(f"this invite ended on {ended}: ask the owner of {name} for a new one")
    assert owner is not None
    folder = (Path.home() / ".tesseract" / f"{name}-{owner.short}" if folder is None else folder).absolute()
    config = folder / "serve.toml"
    towards = ["--run", found.run, "-p", ",".join(found.seeds)]
    is_new = not config.exists()
    # the volunteer's limits stay as they are, but a later invite counts
    again = ["--config", str(config), *towards, *(("--grant", found.grant) if found.grant else ())]
    parent = click.get_current_context().find_root()
    assert isinstance(parent.command, click.Group)
    serve = parent.command.get_command(parent, "serve")
    assert serve is not None
    first = [*towards, "--host", host_towards(found.seeds)] if is_new else again
    with _writing():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with serve.make_context("serve", [*first, *options], parent=parent) as context:
        rates = _examine(context.params, folder)
    if is_new:
        text = _config(found, folder, rates)
        with _writing():
            write_whole(config, [text.encode()])
            config.chmod(0o600)
    words = [*(again[:2] if is_new else again), *options]
    with serve.make_context("serve", list(words), parent=parent) as context:
        for line in lends(context.params, folder):
            click.echo(line, err=True)
        if sys.stdin.isatty() and not yes:
            click.echo(f"Other limits: change {config}, and join again.", err=True)
            click.confirm("Lend this?", default=True, abort=True, err=True)
        if install:
            _install(f"tesseract-{name}-{owner.short}", found.run, folder, words)
        else:
            serve.invoke(context)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Raises: click.ClickException with a sentence for an OSError."""
    try:
        yield
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}; choose another --folder") from None


def lends(params: Mapping[str, Any], folder: Path) -> list[str]:
    """Return in three lines what a `serve` with these parameters lends: memory, rates, hours."""
    memory, disk = params["max_memory_bytes"], params["hold_bytes"]
    gigabytes = "as it takes" if memory is None else f"up to {memory / 1e9:.1f} GB"
    held = "a tenth of what is free, at most 20 GB" if disk is None else f"up to {disk / 1e9:.1f} GB"
    up, down, quota = params["max_upload_rate"], params["max_download_rate"], params["data_quota_bytes"]
    rates = ["as fast as it goes" if rate is None else f"up to {rate_text(rate)}" for rate in (up, down)]
    hours, load = params["hours"], params["pause_above_load"]
    when = ", ".join(map(str, hours)) or "at all hours"
    total = "" if quota is None else f", {quota / 1e9:.0f} GB in each {params['quota_period']}"
    pauses = "" if load is None else f"; pauses while other programs use more than {load:.0%} of the processors"
    return [
        f"memory: {gigabytes}, on {', '.join(params['devices'])}; disk: {held}, in {folder}",
        f"rates:  sends {rates[0]}, receives {rates[1]}{total}",
        f"hours:  {when}{pauses}",
    ]


def _config(invite: Invite, folder: Path, rates: tuple[float, float] | None) -> str:
    """Return the options of `serve` for a newcomer, whose line sends and receives this many bytes per second."""
    limits = [
        most if rates is None else min(most, LINE_SHARE * rate)
        for most, rate in zip((MAX_UPLOAD, MAX_DOWNLOAD), rates or (0.0, 0.0), strict=True)
    ]
    upload, download = map(rate_text, limits)
    memory = max(0.25, int(4 * MEMORY_SHARE * psutil.virtual_memory().available / 2**30) / 4)
    join: dict[str, object] = {
        "run": invite.run,
        "initial-peers": list(invite.seeds),
        "host": host_towards(invite.seeds),
    }
    tables: dict[str, dict[str, object]] = {
        "join": join | ({"grant": invite.grant} if invite.grant else {}),
        "keeps": {"identity": str(folder / "identity.pem"), "checkpoint-dir": str(folder / "states")},
        "lends": {
            "device": _devices(),
            "threads": max(1, (os.cpu_count() or 1) // 2),
            "max-memory": f"{memory} GiB",
            "max-upload": upload,
            "max-download": download,
        },
    }
    lines = ["# What this computer lends; `tesseract serve --help` shows what else there is"]
    for table, values in tables.items():
        lines += ["", f"[{table}]", *(f"{name} = {_toml(value)}" for name, value in values.items())]
    return "\n".join(lines) + "\n" + MORE


def _toml(value: object) -> str:
    # as JSON, but for letters that need two escapes there, or none
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _devices() -> list[str]:
    with spinner("loading PyTorch"):
        import torch
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


def _examine(params: Mapping[str, Any], folder: Path) -> tuple[float, float] | None:
    """Say what is not as it should be. Returns the bytes per second that the line sends and receives, if a seed helped
    to measure it. Raises: click.ClickException where something keeps this computer out."""
    seeds, host = params["initial_peers"], params["host"]

    async def look() -> tuple[Check, list[list[Check]]]:
        async def ask(seed: str) -> list[Check]:
            return [check async for check in reach(seed, host, 0, upnp=False, is_quick=True)]

        return await port_pair(host, params["port"]), await asyncio.gather(*map(ask, seeds))

    with spinner("looking for what would keep this computer out"):
        listening, asked = asyncio.run(look())
    bad = [check for checks in asked for check in checks if check.verdict == "bad"]
    notes = [check for check in room(folder) if check.verdict != "good"]
    if listening.verdict == "bad":
        raise click.ClickException(_sentence(listening))
    if bad and all(any(check.verdict == "bad" for check in checks) for checks in asked):
        raise click.ClickException("\n".join(map(_sentence, bad)))
    for check in (*notes, *bad):  # one seed that answers is enough
        click.echo(f"note: {_sentence(check)}", err=True)
    return max((check.rates for checks in asked for check in checks if check.rates is not None), default=None)


def _sentence(check: Check) -> str:
    return f"{check.what}: {check.found}. {check.advice}"


def _install(name: str, run: str, folder: Path, words: Sequence[str]) -> None:
    """Write a unit for systemd, the system's or the user's, and start it. Raises: click.ClickException."""
    if sys.platform != "linux":
        raise click.ClickException("--install needs systemd, which this system does not have: leave it out")
    is_root = os.geteuid() == 0
    home = Path("/etc/systemd/system") if is_root else Path.home() / ".config/systemd/user"
    unit = home / f"{name}.service"
    serve = shlex.join([sys.executable, "-m", "tesseract_async", "serve", *words, "--log-format", "json"])
    target = "multi-user.target" if is_root else "default.target"
    systemctl = ["systemctl"] if is_root else ["systemctl", "--user"]
    command, where = serve.replace("$", "$$").replace("%", "%%"), str(folder).replace("%", "%%")
    text = UNIT.format(run=run, command=command, folder=where, target=target)
    try:
        write_whole(unit, [text.encode()])
        for action in (["daemon-reload"], ["enable", "--now", name]):
            subprocess.run([*systemctl, *action], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = str(getattr(error, "stderr", "")).strip() or getattr(error, "strerror", None) or str(error)
        start = f"start it by `{' '.join(systemctl)} enable --now {name}`"
        raise click.ClickException(f"{unit} could not be started: {reason}. Where systemd runs, {start}") from None
    click.echo(f"{unit} is at work: journalctl {'' if is_root else '--user '}--unit {name} --follow", err=True)
    if not is_root:
        click.echo("So that it goes on while you are logged out: loginctl enable-linger", err=True)
