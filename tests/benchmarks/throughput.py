"""Expert calls per second through the whole stack.

Without arguments: the loads that hivemind is compared on (`loads.COMPARED`), with TLS and where asked without. With
`--preset`: one of the original Tesseract's benchmark, as it was or, with `--scale cpu`, in a size for two cores.

    python -m tests.benchmarks.throughput --preset ffn_forward --scale cpu --security tls
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace

import torch

from tests.benchmarks.figures import emit, percentile
from tests.benchmarks.loads import COMPARED, SMALL, Load
from tests.benchmarks.processes import all_latencies, rate
from tests.benchmarks.swarm import Security, make_backend, run_load

PLAIN_TOO = ("nop 2048x1024, 4 clients",)
DIRECT = ("ffn 256x256, 8 clients",)


@dataclass(frozen=True)
class Preset:
    """A set-up of the original benchmark: each client calls `num_batches` times, the experts in turn."""

    kind: str = "ffn"
    backward: bool = True
    num_experts: int = 16
    num_clients: int = 128
    rows: int = 2048
    width: int = 1024
    max_batch_size: int = 8192
    num_batches: int = 16

    def for_cpu(self) -> Preset:
        """The same proportions for two cores: a 32nd of the clients, a quarter of rows and batches, and narrower
        feed-forward layers."""
        return replace(
            self,
            num_clients=max(1, self.num_clients // 32),
            rows=max(1, self.rows // 4),
            width=self.width if self.kind == "nop" else self.width // 4,
            max_batch_size=self.max_batch_size // 4,
            num_batches=self.num_batches // 2 if self.kind == "nop" else self.num_batches // 4,
        )


PRESETS = {
    "default": Preset(),
    "ffn_forward": Preset(backward=False),
    "ffn_small_batch": Preset(backward=False, num_experts=4, rows=32),
    "ffn_massive": Preset(backward=False, num_clients=512, rows=512),
    "minimalistic": Preset(num_experts=1, num_clients=1),
    "nop": Preset(kind="nop", backward=False),
}


def measure_preset(name: str, *, scale: str, security: Security, loop: str) -> None:
    """Prints the preset's rows/s."""
    preset = PRESETS[name].for_cpu() if scale == "cpu" else PRESETS[name]
    load = Load(
        name=f"preset {name} ({scale}, {security})",
        kind=preset.kind,
        rows=preset.rows,
        width=preset.width,
        num_clients=preset.num_clients,
        num_experts=preset.num_experts,
        backward=preset.backward,
        max_batch_size=preset.max_batch_size,
        seconds=3600.0,
    )
    threads = torch.get_num_threads() if scale == "full" else 1
    results, served = run_load(load, security=security, loop=loop, num_threads=threads, num_batches=preset.num_batches)
    seconds = max(result.seconds for result in results)
    rows = sum(result.num_calls for result in results) * load.rows
    emit(load.name, rows / seconds, "rows/s", seconds=seconds, mean_batch_rows=served.mean_batch_rows)


def measure_load(load: Load, *, security: Security, loop: str) -> float:
    """Prints the load's figure, calls/s where a call is small and rows/s where it is not. Returns its rows/s."""
    results, served = run_load(load, security=security, loop=loop)
    calls = rate(results)
    latencies = all_latencies(results)
    value, unit = (calls, "calls/s") if load.rows == 1 else (calls * load.rows, "rows/s")
    num_calls = sum(result.num_calls for result in results)
    emit(
        f"{load.name}, {security}",
        value,
        unit,
        num_calls=num_calls,
        client_cpu_us_per_call=sum(result.cpu_seconds for result in results) / num_calls * 1e6,
        server_cpu_us_per_call=served.cpu_seconds / num_calls * 1e6,
        median_ms=percentile(latencies, 0.5) * 1e3,
        p99_ms=percentile(latencies, 0.99) * 1e3,
        mean_batch_rows=served.mean_batch_rows,
        busy_share=served.busy_share,
    )
    if load.name == SMALL[1].name and security == "tls":
        seconds = sum(result.cpu_seconds + result.server_cpu_seconds for result in results)
        emit(f"{load.name}, {security}: processor time", seconds / num_calls * 1e6, "us")
    if load.name in DIRECT:
        direct = direct_rate(load, round(served.mean_batch_rows))
        emit(f"{load.name}: backend called directly", direct, "rows/s", rows=round(served.mean_batch_rows))
        emit(f"{load.name}, {security}: share of direct", calls * load.rows / direct, "", asked=">= 0.8")
    return calls * load.rows


def direct_rate(load: Load, rows: int) -> float:
    """Rows/s of forward, gradients and step of the same expert called in a plain loop, in batches of `rows`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        backend = make_backend(load)
        batch, gradient = torch.randn(rows, load.width), torch.ones(rows, load.width)
        num_batches, begin, stop_at = 0, 0.0, float("inf")
        while (now := time.perf_counter()) < stop_at:
            if num_batches == 3:  # warm
                begin, stop_at = now, now + load.seconds / 2
            backend.forward([batch])
            _, of_parameters = backend.gradients([batch], [gradient])
            backend.step(of_parameters)
            num_batches += 1
        return (num_batches - 3) * rows / (now - begin)
    finally:
        torch.set_num_threads(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loads", nargs="*", metavar="LOAD", help="only these of the compared loads")
    parser.add_argument("--preset", choices=(*PRESETS, "all"))
    parser.add_argument("--scale", choices=("full", "cpu"), default="full")
    parser.add_argument(
        "--security", choices=("tls", "plain"), help="tls; the compared loads also run plain by default"
    )
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    args = parser.parse_args()
    if args.preset:
        for name in PRESETS if args.preset == "all" else (args.preset,):
            measure_preset(name, scale=args.scale, security=args.security or "tls", loop=args.loop)
        return
    for load in (*COMPARED, *(load for load in SMALL if load not in COMPARED)):
        if args.loads and load.name not in args.loads:
            continue
        for security in ("tls", "plain"):
            if args.security == security or (args.security is None and (security == "tls" or load.name in PLAIN_TOO)):
                measure_load(load, security=security, loop=args.loop)


if __name__ == "__main__":
    main()
