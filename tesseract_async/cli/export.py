"""`tesseract export`: collects a run's weights into a folder that loads without the swarm."""

from __future__ import annotations

import math
from pathlib import Path

import click

from tesseract_async.admission import Policy
from tesseract_async.cli.options import NodeOptions, allow_file_option, join, node_options
from tesseract_async.cli.running import asynchronous, progress_bar, say
from tesseract_async.cli.types import FOLDER, PERIOD, counted
from tesseract_async.errors import describe
from tesseract_async.experts.run_directory import find_run
from tesseract_async.identity import PeerID


@click.command("export")
@click.option(
    "--run", "run_name", required=True, metavar="NAME[@PEER_ID]", help="Collect the weights of this training run."
)
@click.option("--out", required=True, type=FOLDER, help="Write the weights into this folder, made if missing.")
@click.option(
    "--num-at-once", default=4, type=click.IntRange(1, 64), help="Download this many experts at the same time."
)
@click.option("--timeout", default=60.0, type=PERIOD, help="Wait at most this long for each piece of an expert.")
@allow_file_option
@node_options
@asynchronous
async def command(
    *,
    run_name: str,
    out: Path,
    num_at_once: int,
    timeout: float,
    members: frozenset[PeerID] | None,
    node: NodeOptions,
) -> int:
    """Collect the weights of every expert of a run that somebody has, as safetensors files with their versions.

    They come from an expert's primary or, where it has none, from a server that follows it or holds its state.

    The folder loads anywhere: `tesseract_async.server.export.load_export(FOLDER)["ffn.3.7"]` is an ordinary module.
    Run the command again to download only what is newer. The exit status is 1 if an expert could not be downloaded.
    """
    if not node.initial_peers:
        raise click.UsageError("say --initial-peers: whose swarm?")

    from tesseract_async.server.export import export_experts, find_origins

    async with node.make(policy=None if members is None else Policy.only(members)) as joined:
        await join(joined)
        signed = await find_run(joined.network, run_name, trust=joined.trust)
        await joined.join_run(signed)
        manifest = signed.manifest
        origins = await find_origins(joined, signed)
        with progress_bar("experts", total=len(origins)) as advance:
            report = await export_experts(
                joined,
                signed,
                origins,
                out,
                num_at_once=num_at_once,
                timeout=timeout,
                progress=lambda uid: advance(1),
            )
    for role in ("follower", "holder"):
        if some := sorted(uid for uid, one in report.origins.items() if one == role):
            told = ", ".join(f"{uid} (version {report.taken[uid]})" for uid in some)
            click.echo(f"from a {role}, for want of a primary: {told}", err=True)
    for uid, error in sorted(report.failed.items()):
        click.echo(f"{uid}: {describe(error)}", err=True)
    click.echo(
        f"{counted(len(report.taken), 'expert')} written, {len(report.kept)} were up to date, "
        f"{len(report.failed)} failed; of the run's {math.prod(manifest.grid_size)}, somebody has {len(origins)}",
        err=True,
    )
    say(
        "exported",
        run=signed.full_name,
        folder=str(out),
        taken=report.taken,
        origins=report.origins,
        kept=report.kept,
        failed=sorted(report.failed),
    )
    return 1 if report.failed or not origins else 0
