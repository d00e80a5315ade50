"""`tesseract export`: collects a run's weights into a folder that loads without the swarm."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tesseract_async.cli.options import allow_file_option, join, listed, node_options, outside_help, peers
from tesseract_async.cli.running import run, say, set_up_logging
from tesseract_async.cli.units import PERIOD, counted
from tesseract_async.cli.waiting import bar
from tesseract_async.errors import describe

if TYPE_CHECKING:
    from tesseract_async.experts import ExpertReplica
    from tesseract_async.experts.run import RunManifest
    from tesseract_async.node import TesseractNode


@click.command("export")
@click.option("--run", "run_name", required=True, metavar="NAME[@PEER_ID]", help="Whose weights.")
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder, made if missing.")
@click.option("--num-at-once", default=4, show_default=True, type=click.IntRange(1, 64), help="Experts at a time.")
@click.option("--timeout", default=60.0, show_default=True, type=PERIOD, help="Seconds for each piece of an expert.")
@allow_file_option
@node_options
def command(run_name: str, out: Path, num_at_once: int, timeout: float, **values: Any) -> None:
    """Collect the weights of every live expert of a run, as safetensors files with their versions.

    The folder loads anywhere: `tesseract_async.server.export.load_export(FOLDER)["ffn.3.7"]` is an ordinary module. Run
    it again to take only what is newer. Exit status 1: some experts could not be had.
    """
    set_up_logging(verbose=values["verbose"])
    if not values["initial_peers"]:
        raise click.UsageError("say --initial-peers: whose swarm?")

    async def main() -> int:
        from tesseract_async.experts.run_directory import find_run
        from tesseract_async.node import TesseractNode
        from tesseract_async.server.export import export_experts

        node = TesseractNode(
            values["host"],
            values["port"],
            initial_peers=peers(values["initial_peers"]),
            announce=values["announce"],
            public=values["public"],
            **outside_help(values),
            identity=values["identity"],
            policy=listed(),
        )
        async with node:
            await join(node)
            signed = await find_run(node.network, run_name, trust=node.trust)
            if signed.tag is not None:
                await node.join_run(signed)
            replicas = await live_replicas(node, signed.manifest)
            with bar("experts", total=len(replicas)) as advance:
                report = await export_experts(
                    node,
                    signed,
                    replicas,
                    out,
                    num_at_once=num_at_once,
                    timeout=timeout,
                    progress=lambda uid: advance(1),
                )
        for uid, error in sorted(report.failed.items()):
            click.echo(f"{uid}: {describe(error)}", err=True)
        size = math.prod(signed.manifest.grid_size)
        click.echo(
            f"{counted(len(report.taken), 'expert')} written, {len(report.kept)} were up to date, "
            f"{len(report.failed)} failed; "
            f"{len(replicas)} of the run's {size} are alive",
            err=True,
        )
        say(
            "exported",
            run=signed.full_name,
            folder=str(out),
            taken=report.taken,
            kept=report.kept,
            failed=sorted(report.failed),
        )
        return 1 if report.failed or not replicas else 0

    run(main)


async def live_replicas(node: TesseractNode, manifest: RunManifest) -> dict[str, list[ExpertReplica]]:
    """uid -> its servers, the primary first, of every live expert of the run."""
    node.directory.watch(manifest.prefix, manifest.grid_size)
    await node.directory.wait_warm(manifest.prefix)
    view = node.directory.live(manifest.prefix)
    assert view is not None
    return {view.uid(row): view.replicas_at(row) for row in range(len(view))}
