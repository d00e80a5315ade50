"""Runs the benchmarks one after another and prints one table.

    python -m tests.benchmarks                  # everything, the peers included where they are installed
    python -m tests.benchmarks ceilings dht     # those whose name contains one of the words
    python -m tests.benchmarks --list

Every benchmark is a file of this directory with a `main()` that prints figures, one JSON object a line. It runs in a
process of its own, alone. `make bench` first installs the peers into environments of their own.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tests.benchmarks.comparisons import compare, comparison_table
from tests.benchmarks.figures import Figure, number, read_figure, table
from tests.benchmarks.peers.install import NAMES, python_of

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NO_BENCHMARKS = {"__main__", "comparisons", "faulty", "figures", "loads", "modules", "processes", "swarm"}
FIRST = ("ceilings", "throughput", "throughput_presets", "throughput_dht", "throughput_mixture")
SIDES = {"hivemind": "hivemind", "rpc_grpc": "grpc.aio", "rpc_torch": "torch.distributed.rpc", "rpc_ray": "ray"}
"""The peers by how their files begin."""
LONG = {
    "client_shared",
    "client_shared_faults",
    "nat_links",
    "network_churn",
    "network_growth",
    "network_simulated",
    "run_churn",
}  # minutes to hours: when named, or with --long
TIMEOUT = 300.0
LONG_TIMEOUT = 4 * 3600.0


@dataclass(frozen=True)
class Benchmark:
    """One process that prints figures."""

    name: str
    command: tuple[str, ...]
    side: str = "ours"


@dataclass(frozen=True)
class Outcome:
    """What one benchmark printed, and how it ended."""

    benchmark: Benchmark
    figures: tuple[Figure, ...]
    seconds: float
    error: str | None
    load_average: float
    """Of the last minute before it began: on a quiet machine below the number of cores."""


def find_benchmarks() -> list[Benchmark]:
    """Every benchmark: the stack's first, then the rooms' own by name, then the peers' sides that are installed."""
    stems = {path.stem for path in HERE.glob("*.py")} - NO_BENCHMARKS
    stems = {stem for stem in stems if not stem.startswith("test_")}
    commands = {stem: (sys.executable, "-m", f"tests.benchmarks.{stem}") for stem in stems}
    commands["throughput_presets"] = (*commands["throughput"], "--preset", "all", "--scale", "cpu")
    names = [name for name in FIRST if name in commands] + sorted(set(commands) - set(FIRST))
    found = [Benchmark(name, commands[name]) for name in names]
    for name in NAMES:
        if not python_of(name).exists():
            print(f"left out: peers/{name}_*.py (python tests/benchmarks/peers/install.py {name} installs their needs)")
            continue
        for path in sorted((HERE / "peers").glob(f"{name}_*.py")):
            side = next(side for prefix, side in SIDES.items() if path.stem.startswith(prefix))
            command = (str(python_of(name)), "-m", f"tests.benchmarks.peers.{path.stem}")
            found.append(Benchmark(path.stem, command, side))
    return found


def run(benchmark: Benchmark, log: Path) -> Outcome:
    """Runs one benchmark to its end, showing each figure as it comes; everything else it says goes to `log`."""
    print(f"\n{benchmark.name}", flush=True)
    load_average, begin = os.getloadavg()[0], time.monotonic()
    figures: list[Figure] = []
    error = None
    with log.open("ab") as said:
        said.write(f"==== {benchmark.name}\n".encode())
        said.flush()
        process = subprocess.Popen(benchmark.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=said, text=True)
        timeout = LONG_TIMEOUT if benchmark.name in LONG else TIMEOUT
        killer = threading.Timer(timeout, process.kill)
        killer.start()
        assert process.stdout is not None
        for line in process.stdout:
            figure = read_figure(line)
            if figure is None:
                said.write(line.encode())
                continue
            figures.append(figure)
            print(f"  {figure.name}: {number(figure.value)} {figure.unit}".rstrip(), flush=True)
        code = process.wait()
        killer.cancel()
    if code != 0:
        error = f"took over {timeout:.0f} s" if code == -signal.SIGKILL else f"ended with code {code}"
        print(f"  {error}: see {log}", flush=True)
    return Outcome(benchmark, tuple(figures), time.monotonic() - begin, error, load_average)


def describe_machine() -> dict[str, str]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    versions = {name: importlib.metadata.version(name) for name in ("torch", "uvloop", "msgpack", "cryptography")}
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} x {cpu}",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **versions,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="run the benchmarks whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--long", action="store_true", help="also those that take minutes to hours")
    parser.add_argument("--no-peers", action="store_true", help="leave the peers out")
    parser.add_argument("--json", type=Path, default=ROOT / "bench.json", help="where the figures are saved")
    args = parser.parse_args()
    benchmarks = [
        each
        for each in find_benchmarks()
        if (not args.words or any(word in each.name for word in args.words))
        and (args.long or args.list or each.name not in LONG or each.name in args.words)
        and not (args.no_peers and each.side != "ours")
    ]
    if args.list:
        print("\n".join(each.name for each in benchmarks))
        return 0
    log = args.json.with_suffix(".log")
    log.unlink(missing_ok=True)
    machine = describe_machine()
    outcomes = [run(each, log) for each in benchmarks]
    report(outcomes, machine, args.json)
    return 1 if any(outcome.error for outcome in outcomes) else 0


def report(outcomes: list[Outcome], machine: dict[str, str], path: Path) -> None:
    """Prints the tables and saves everything."""
    sides = {
        side: {figure.name: figure for each in outcomes if each.benchmark.side == side for figure in each.figures}
        for side in ("ours", *SIDES.values())
    }
    ratios = compare(sides)
    print(f"\n{', '.join(f'{key} {value}' for key, value in machine.items())}\n")
    if ratios:
        print(f"{comparison_table(ratios)}\n")
    theirs = [
        replace(figure, name=f"{side}: {figure.name}") for side in SIDES.values() for figure in sides[side].values()
    ]
    print(table([*sides["ours"].values(), *theirs]))
    failed = [f"{each.benchmark.name} {each.error}" for each in outcomes if each.error]
    if failed:
        print(f"\nfailed: {'; '.join(failed)}")
    saved = {
        "machine": machine,
        "comparisons": [asdict(figure) | {"met": figure.met} for _, figure in ratios],
        "benchmarks": [
            {
                "name": each.benchmark.name,
                "side": each.benchmark.side,
                "seconds": each.seconds,
                "error": each.error,
                "load_average": each.load_average,
                "figures": [asdict(figure) | {"met": figure.met} for figure in each.figures],
            }
            for each in outcomes
        ],
    }
    path.write_text(json.dumps(saved, indent=1) + "\n")
    print(f"\nsaved to {path}")


if __name__ == "__main__":
    raise SystemExit(main())
