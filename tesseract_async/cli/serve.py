"""`tesseract serve`: hosts experts until told to leave."""

from __future__ import annotations

import asyncio
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tesseract_async.cli.options import node_options, peers
from tesseract_async.cli.running import run, say, set_up_logging, until_told_to_leave

if TYPE_CHECKING:
    from tesseract_async.runtime.backend import ExpertBackend
    from tesseract_async.server.server import TesseractServer


@click.command("serve")
@click.option(
    "--experts",
    "patterns",
    multiple=True,
    required=True,
    metavar="PATTERN",
    help="Uids to host, such as ffn.3.7 or 'ffn.[0:4].[0:16]'; may be given several times.",
)
@click.option("--expert-class", default="ffn", show_default=True, help="Name of a ready-made class, or module:builder.")
@click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="NAME=NUMBER",
    help="A size that the class takes, such as in_features=1024; may be given several times.",
)
@click.option(
    "--optimizer",
    default="adam",
    show_default=True,
    type=click.Choice(["adam", "adamw", "sgd", "none"]),
    help="Steps the experts; none freezes them.",
)
@click.option("--learning-rate", default=1e-3, show_default=True, type=float)
@click.option(
    "--max-batch-size", default=4096, show_default=True, type=click.IntRange(1), help="Rows computed at once."
)
@click.option("--seed", default=0, show_default=True, help="Of the experts' first weights, together with their uids.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="CPU threads of one computation.")
@click.option(
    "--checkpoint-dir",
    type=click.Path(file_okay=False),
    help="Where weights and optimizer states are kept; a restart goes on from there.",
)
@click.option("--checkpoint-period", default=60.0, show_default=True, help="Seconds between checkpoints.")
@click.option("--ttl", default=45.0, show_default=True, help="Seconds until others forget this server if it vanishes.")
@click.option(
    "--report-period", type=float, help="Print a line of JSON with the experts' versions every so many seconds."
)
@node_options
def command(
    patterns: tuple[str, ...],
    expert_class: str,
    sizes: tuple[str, ...],
    optimizer: str,
    learning_rate: float,
    max_batch_size: int,
    seed: int,
    device: str,
    threads: int,
    checkpoint_dir: str | None,
    checkpoint_period: float,
    ttl: float,
    report_period: float | None,
    host: str,
    port: int,
    initial_peers: tuple[str, ...],
    announce: str | None,
    public: bool,
    identity: str | None,
    verbose: bool,
    leave_with_parent: bool,
) -> None:
    """Lend this machine: host experts, train them as others send gradients, and keep their weights.

    Prints one line of JSON on standard output once the experts can be found. Ctrl-C leaves cleanly: what is running
    is finished, the experts are withdrawn from the network, and their weights are saved.
    """
    set_up_logging(verbose=verbose)
    uids = _uids(patterns)
    kwargs = _sizes(sizes)

    async def main() -> int:
        import torch

        from tesseract_async.experts import PublisherSettings
        from tesseract_async.monitoring import StatusService
        from tesseract_async.node import TesseractNode
        from tesseract_async.server.registry import make_backend
        from tesseract_async.server.server import TesseractServer

        torch.set_num_threads(threads)

        def backend(uid: str) -> ExpertBackend:
            # the same first weights at each start, others for each expert
            torch.manual_seed(zlib.crc32(f"{seed}/{uid}".encode()))
            return make_backend(
                expert_class,
                optimizer=None if optimizer == "none" else optimizer,
                learning_rate=learning_rate,
                max_batch_size=max_batch_size,
                sizes=kwargs,
            )

        try:
            backends = {uid: backend(uid) for uid in uids}
        except TypeError as error:
            raise ValueError(f"--size does not fit the class {expert_class!r}: {error}") from None
        node = TesseractNode(
            host,
            port,
            initial_peers=peers(initial_peers),
            announce=announce,
            public=public,
            identity=identity,
        )
        settings = PublisherSettings(ttl=ttl, refresh_period=ttl / 3, retry_period=min(1.0, ttl / 10))
        async with (
            node,
            TesseractServer(
                node,
                backends,
                device=device,
                checkpoint_dir=None if checkpoint_dir is None else Path(checkpoint_dir),
                checkpoint_period=checkpoint_period,
                publisher_settings=settings,
            ) as server,
            StatusService(node, server),
        ):
            address = str(node.peer_address)
            click.echo(f"{len(uids)} experts are being served at {address}; Ctrl-C leaves cleanly", err=True)
            say("ready", address=address, peer_id=str(node.peer_id), uids=uids, versions=_versions(server))
            reports = asyncio.create_task(_report(server, report_period)) if report_period else None
            try:
                reason = await until_told_to_leave(watch_stdin=leave_with_parent)
            finally:
                if reports is not None:
                    reports.cancel()
                    await asyncio.gather(reports, return_exceptions=True)
            click.echo(f"leaving ({reason}): finishing, withdrawing, saving", err=True)
        say("left", versions=_versions(server))
        return 0

    run(main)


def _versions(server: TesseractServer) -> dict[str, int]:
    return {uid: backend.version for uid, backend in server.experts.items()}


async def _report(server: TesseractServer, period: float) -> None:
    while True:
        await asyncio.sleep(period)
        say("report", versions=_versions(server))


def _uids(patterns: tuple[str, ...]) -> list[str]:
    from tesseract_async.experts import ExpertPattern

    uids: dict[str, None] = {}
    for text in patterns:
        try:
            pattern = ExpertPattern.parse(text)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--experts") from None
        if len(pattern) > 4096:
            raise click.BadParameter(
                f"{text} are {len(pattern)} experts; one server hosts at most 4096", param_hint="--experts"
            )
        uids |= dict.fromkeys(pattern)
    return list(uids)


def _sizes(values: tuple[str, ...]) -> dict[str, int | float]:
    sizes: dict[str, int | float] = {}
    for value in values:
        name, separator, number = value.partition("=")
        try:
            if not (name.isidentifier() and separator):
                raise ValueError
            sizes[name] = float(number) if "." in number else int(number)
        except ValueError:
            raise click.BadParameter(f"{value!r} is not like in_features=1024", param_hint="--size") from None
    return sizes
