"""`tesseract bench`: measures what this machine would contribute."""

import json
import time

import click

from tesseract_async.cli.flags import options_of
from tesseract_async.cli.options import find_code_here, json_option
from tesseract_async.cli.running import asynchronous, importing, set_up_logging, spinner
from tesseract_async.cli.serve_options import ServeOptions
from tesseract_async.cli.types import ROWS, Number

UID = "bench.0"


@click.command("bench")
@options_of(ServeOptions)["expert_class"]
@click.option("--in-features", default=1024, type=ROWS, help="Measure experts that take rows of this many numbers.")
@click.option("--rows", default=256, type=ROWS, help="Send this many rows in each call.")
@click.option("--seconds", default=2.0, type=Number(0.1, 86400), help="Spend this many seconds on each measurement.")
@click.option("--device", default="cpu", help="Compute on this device, such as cpu or cuda:0.")
@options_of(ServeOptions)["threads"]
@json_option
@asynchronous
async def command(
    *, expert_class: str, in_features: int, rows: int, seconds: float, device: str, threads: int, as_json: bool
) -> int:
    """Measure what this machine would contribute: rows per second through an expert, called over loopback.

    Run it on an idle machine. Forward passes are measured first, then forward and backward passes with an optimizer
    step. One caller keeps four calls under way all the time.
    """
    set_up_logging()
    if ":" in expert_class:
        find_code_here()

    import asyncio

    with spinner("loading PyTorch"), importing():
        import torch

        import tesseract_async as ta
        from tesseract_async.server.registry import make_backend
        from tesseract_async.wire.tensors import flatten

    torch.set_num_threads(threads)
    backend = make_backend(expert_class, sizes={"in_features": in_features})
    if len(backend.input_specs) != 1:
        raise ValueError(
            f"{expert_class} takes {len(backend.input_specs)} tensors; bench measures experts that take one"
        )
    spec = backend.input_specs[0]
    x = torch.randn(rows, *spec.least_shape, dtype=spec.dtype)

    async def measure(backward: bool) -> float:
        loop = asyncio.get_running_loop()
        end, done = loop.time() + seconds, 0

        async def caller() -> None:
            nonlocal done
            while loop.time() < end:
                if backward:
                    y = await expert(x.clone().requires_grad_())
                    await ta.backward(sum(part.sum() for part in flatten(y)))
                else:
                    with torch.no_grad():
                        await expert(x)
                done += rows

        started = time.perf_counter()
        await asyncio.gather(*(ta.isolated(caller()) for _ in range(4)))
        return done / (time.perf_counter() - started)

    async with (
        ta.TesseractNode() as server_node,
        ta.TesseractServer(server_node, {UID: backend}, device=device),
        ta.TesseractNode(initial_peers=[server_node.address]) as node,
    ):
        expert = await node.get_expert(UID)
        with torch.no_grad():
            await expert(x)
        facts: dict[str, str | int | float] = {
            "expert_class": expert_class,
            "in_features": in_features,
            "rows_per_call": rows,
            "device": device,
        }
        rates = {}
        for name, backward in (("forward", False), ("training", True)):
            with spinner(f"measuring {name}"):
                rates[name] = round(await measure(backward), 1)
        facts |= {f"{name}_rows_per_second": rate for name, rate in rates.items()}
    if as_json:
        click.echo(json.dumps(facts))
    else:
        click.echo(f"{expert_class}, {in_features} wide, {rows} rows per call, on {device}, over loopback:")
        click.echo(f"  forward                 {rates['forward']:>12,.0f} rows/s")
        click.echo(f"  forward and backward    {rates['training']:>12,.0f} rows/s")
    return 0
