"""`tesseract call UID`: try an expert."""

from __future__ import annotations

import json
import time

import click

from tesseract_async.cli.options import enter, join, joining_options, run_option, visiting_node
from tesseract_async.cli.running import importing, run, set_up_logging
from tesseract_async.cli.units import MANY, counted
from tesseract_async.cli.waiting import bar, sign


@click.command("call")
@click.argument("uid")
@joining_options
@run_option
@click.option(
    "--rows", default=1, show_default=True, type=click.IntRange(1, MANY), help="Rows of random numbers to send."
)
@click.option("--repeat", default=1, show_default=True, type=click.IntRange(1), help="Calls, one after the other.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def command(
    uid: str,
    initial_peers: tuple[str, ...],
    identity: str | None,
    verbose: bool,
    run_name: str | None,
    rows: int,
    repeat: int,
    as_json: bool,
) -> None:
    """Find the expert UID, call it forward with random rows (nothing is trained), and say what came and how fast."""
    set_up_logging(verbose=verbose)

    async def main() -> int:
        with sign("loading PyTorch"), importing():
            import torch

            from tesseract_async.client.expert_rpc import fetch_schema
            from tesseract_async.experts import split_uid
            from tesseract_async.wire.tensors import describe_schema, describe_structure, flatten, unflatten

        split_uid(uid)  # a malformed one is said so at once
        async with visiting_node(initial_peers, identity) as node:
            await join(node)
            await enter(node, run_name)
            expert = await node.get_expert(uid)
            replicas = await node.directory.find(uid)
            schema = await fetch_schema(node, uid, replicas[0].peer, timeout=10.0)
            inputs = schema.inputs
            tensors = [
                torch.randn(rows, *spec.shape, dtype=spec.dtype)
                if spec.dtype.is_floating_point
                else torch.zeros(rows, *spec.shape, dtype=spec.dtype)
                for spec in flatten(inputs)
            ]
            args, kwargs = unflatten(inputs, tensors)
            seconds = []
            with bar("calling", total=repeat) as advance:
                for _ in range(repeat):
                    started = time.perf_counter()
                    with torch.no_grad():
                        outputs = await expert(*args, **kwargs)
                    seconds.append(time.perf_counter() - started)
                    advance(1)
        seconds.sort()
        facts = {
            "uid": uid,
            "peer_id": str(replicas[0].peer.peer_id),
            "num_replicas": len(replicas),
            "takes": describe_schema(schema.inputs),
            "gave": describe_structure(outputs),
            "median_seconds": seconds[len(seconds) // 2],
        }
        if as_json:
            click.echo(json.dumps(facts))
            return 0
        click.echo(f"{uid} at {facts['peer_id']}, {counted(len(replicas), 'replica')}")
        click.echo(f"takes {facts['takes']}, gave {facts['gave']}")
        click.echo(
            f"answered in {1000 * seconds[len(seconds) // 2]:.1f} ms (median of {repeat}, {counted(rows, 'row')})"
        )
        return 0

    run(main)
