"""`tesseract call UID`: tries an expert."""

import json
import time

import click

from tesseract_async.cli.options import Visit, enter, json_option, run_option, visit_options
from tesseract_async.cli.running import asynchronous, importing, progress_bar, spinner
from tesseract_async.cli.types import ROWS, counted


@click.command("call")
@click.argument("uid")
@visit_options
@run_option
@click.option("--rows", default=1, type=ROWS, help="Send this many rows of random numbers.")
@click.option("--repeat", default=1, type=click.IntRange(1), help="Call this many times, one after the other.")
@json_option
@asynchronous
async def command(*, uid: str, visit: Visit, run_name: str | None, rows: int, repeat: int, as_json: bool) -> int:
    """Try the expert UID: find it, call it with random rows, and show what came back and how fast.

    Only forward passes are asked for: nothing is trained.
    """
    with spinner("loading PyTorch"), importing():
        import torch

        from tesseract_async.client.expert_rpc import ExpertSchema, fetch_info
        from tesseract_async.experts.manifest import split_uid
        from tesseract_async.wire.tensors import describe_schema, describe_structure, flatten, unflatten

    split_uid(uid)  # reports a malformed one before joining
    async with visit.node() as node:
        await enter(node, run_name)
        expert = await node.get_expert(uid)
        replicas = await node.directory.find(uid)
        schema = ExpertSchema.decode(await fetch_info(node, uid, replicas[0].peer, timeout=10.0))
        make = {True: torch.randn, False: torch.zeros}  # by whether the numbers are fractions
        tensors = [
            make[spec.dtype.is_floating_point](rows, *spec.sized(8).shape, dtype=spec.dtype)
            for spec in flatten(schema.inputs)
        ]
        args, kwargs = unflatten(schema.inputs, tensors)
        seconds = []
        with progress_bar("calling", total=repeat) as advance:
            for _ in range(repeat):
                started = time.perf_counter()
                with torch.no_grad():
                    outputs = await expert(*args, **kwargs)
                seconds.append(time.perf_counter() - started)
                advance(1)
    median = sorted(seconds)[len(seconds) // 2]
    facts = {
        "uid": uid,
        "peer_id": str(replicas[0].peer.peer_id),
        "num_replicas": len(replicas),
        "takes": describe_schema(schema.inputs),
        "gave": describe_structure(outputs),
        "median_seconds": median,
    }
    if as_json:
        click.echo(json.dumps(facts))
        return 0
    click.echo(f"{uid} at {facts['peer_id']}, {counted(len(replicas), 'replica')}")
    click.echo(f"takes {facts['takes']}, gave {facts['gave']}")
    click.echo(f"answered in {1000 * median:.1f} ms (median of {repeat}, {counted(rows, 'row')})")
    return 0
