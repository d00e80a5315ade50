"""`tesseract bench`: what this machine would contribute."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from tesseract_async.cli.options import find_code_here
from tesseract_async.cli.running import importing, run, set_up_logging
from tesseract_async.cli.units import MANY, MAX_THREADS, Number
from tesseract_async.cli.waiting import sign

UID = "bench.0"


@click.command("bench")
@click.option("--expert-class", default="ffn", show_default=True, help="Name of a ready-made class, or module:builder.")
@click.option("--in-features", default=1024, show_default=True, type=click.IntRange(1, MANY))
@click.option("--rows", default=256, show_default=True, type=click.IntRange(1, MANY), help="Rows per call.")
@click.option("--seconds", default=2.0, show_default=True, type=Number(0.1, 86400), help="Time for each figure.")
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--threads",
    default=1,
    show_default=True,
    type=click.IntRange(1, MAX_THREADS),
    help="CPU threads of one computation.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def command(
    expert_class: str, in_features: int, rows: int, seconds: float, device: str, threads: int, as_json: bool
) -> None:
    """Measure what this machine would contribute: rows per second through an expert, called over loopback.

    Run it on an idle machine. Forward and backward (with an optimizer step) are measured one after the other, by one
    caller that always has four calls under way.
    """
    set_up_logging(verbose=False)
    if ":" in expert_class:
        find_code_here()

    async def main() -> int:
        import asyncio

        with sign("loading PyTorch"), importing():
            import torch

            import tesseract_async as ta
            from tesseract_async.server.registry import make_backend
            from tesseract_async.wire.tensors import flatten

        torch.set_num_threads(threads)
        backend = make_backend(expert_class, sizes={"in_features": in_features})
        if len(backend.input_specs) != 1:
            raise ValueError(f"{expert_class} takes {len(backend.input_specs)} tensors; bench measures experts of one")
        spec = backend.input_specs[0]
        x = torch.randn(rows, *spec.shape, dtype=spec.dtype)

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
            facts: dict[str, Any] = {
                "expert_class": expert_class,
                "in_features": in_features,
                "rows_per_call": rows,
                "device": device,
            }
            for name, backward in (("forward", False), ("training", True)):
                with sign(f"measuring {name}"):
                    facts[f"{name}_rows_per_second"] = round(await measure(backward), 1)
        if as_json:
            click.echo(json.dumps(facts))
        else:
            click.echo(f"{expert_class}, {in_features} wide, {rows} rows per call, on {device}, over loopback:")
            click.echo(f"  forward                 {facts['forward_rows_per_second']:>12,.0f} rows/s")
            click.echo(f"  forward and backward    {facts['training_rows_per_second']:>12,.0f} rows/s")
        return 0

    run(main)
