"""What an expert needs of its connection: the formulas behind *Assumptions and recommendations*. Units: SI, seconds.

    python docs/needs.py     # writes the tables into the page

`tests/test_needs.py` compares them with simulations, and their bytes with what the codecs give.
"""

import math
from pathlib import Path
from typing import Final

PAGE: Final = Path(__file__).parent / "how-to" / "assumptions.md"
WIDTHS: Final = (256, 1024, 2048, 4096)
DEVICES: Final = {"a laptop's processor": 5e10, "a small GPU": 2e12, "a large GPU": 2e13}
"""Floating-point operations each second that training gets out of it."""
ROWS: Final = 256
ROUND_TRIP: Final = 0.1
CODECS: Final = {"none": 4.0, "bf16": 2.0, "uint8": 1.0}
"""Bytes that a number takes on the wire."""


def num_parameters(width: int) -> int:
    """Of the ready-made class ``ffn``: three layers, four times as wide between them, with biases and norms."""
    return 24 * width * width + 11 * width


def state_bytes(width: int) -> int:
    """Weights and Adam's two moments, in float32."""
    return 3 * 4 * num_parameters(width)


def operations_per_row(width: int) -> float:
    """A multiplication and an addition for each parameter forward, twice that backward."""
    return 6.0 * num_parameters(width)


def bytes_per_row(width: int, bytes_per_number: float = 4.0) -> float:
    """In each direction: inputs and output gradients to the server, outputs and input gradients back."""
    return 2 * width * bytes_per_number


def needed_bandwidth(width: int, device: float, bytes_per_number: float = 4.0) -> float:
    """Bytes each second, in each direction, at which the connection keeps a device busy."""
    return bytes_per_row(width, bytes_per_number) * device / operations_per_row(width)


def rows_per_second(
    width: int,
    *,
    device: float,
    bandwidth: float,
    round_trip: float,
    rows: int = ROWS,
    in_flight: int = 1,
    bytes_per_number: float = 4.0,
) -> float:
    """Rows that one server trains each second for a trainer with `in_flight` calls under way.

    A call is a forward and then a backward: two round trips, its bytes each way, its computation. More calls at once
    hide all but the slowest of the three: the line there, the device, the line back.
    """
    way, computing = (
        rows * bytes_per_row(width, bytes_per_number) / bandwidth,
        rows * operations_per_row(width) / device,
    )
    alone = 2 * round_trip + 2 * way + computing
    return rows * min(in_flight / alone, 1 / max(way, computing))


def needed_in_flight(width: int, *, device: float, bandwidth: float, round_trip: float, rows: int = ROWS) -> int:
    """Calls under way at which distance costs nothing any more."""
    way, computing = rows * bytes_per_row(width) / bandwidth, rows * operations_per_row(width) / device
    return math.ceil((2 * round_trip + 2 * way + computing) / max(way, computing))


def experts_lost(
    num_copies: int, *, stay: float, repair: float, num_experts: int = 1000, seconds: float = 86400
) -> float:
    """Experts that a run loses in `seconds`: all `num_copies` servers that have a state vanish before one is made anew.

    `stay`: seconds that a volunteer stays, on average, before it vanishes without a farewell. `repair`: seconds until a
    vanished copy is noticed and another one is complete.
    """
    missing = repair / (repair + stay)  # the share of the time in which one of several copies is being made anew
    last_one_dies = missing ** (num_copies - 1) * (1 - missing if num_copies > 1 else 1)
    return num_experts * seconds * num_copies / stay * last_one_dies


def least_sync(width: int, *, upload: float, share: float = 0.05) -> float:
    """Seconds between two copies of a state at which sending it takes `share` of a server's upload."""
    return state_bytes(width) / (share * upload)


# -- the page ----------------------------------------------------------------------------------------------------------


def _rate(num_bytes: float) -> str:
    bits = 8 * num_bytes
    for limit, unit in ((1e9, "Gbit/s"), (1e6, "Mbit/s")):
        if bits >= limit:
            return f"{bits / limit:,.0f} {unit}" if bits >= 10 * limit else f"{bits / limit:.1f} {unit}"
    return f"{bits / 1e3:.0f} kbit/s"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.0f} h"
    )


def tables() -> dict[str, list[str]]:
    """Return the tables of the page: name -> lines."""
    heads = [f"{name} ({codec})" for name in DEVICES for codec in ("float32", "bf16")]
    bandwidth = [f"| width | parameters | state | {' | '.join(heads)} |", "|---:|---:|---:|" + "---:|" * len(heads)]
    for width in WIDTHS:
        rates = [_rate(needed_bandwidth(width, device, size)) for device in DEVICES.values() for size in (4.0, 2.0)]
        facts = f"| {width:,} | {num_parameters(width) / 1e6:.1f} M | {_size(state_bytes(width))} |"
        bandwidth.append(f"{facts} {' | '.join(rates)} |")
    rates_mbit = (20, 100, 1000)
    speed = [
        f"| width | {' | '.join(f'{rate:,} Mbit/s' for rate in rates_mbit)} | in flight there |",
        "|---:|" + "---:|" * (len(rates_mbit) + 1),
    ]
    device = DEVICES["a laptop's processor"]
    for width in WIDTHS:
        cells, numbers = [], []
        for rate in rates_mbit:
            at = {"device": device, "bandwidth": rate * 1e6 / 8, "round_trip": ROUND_TRIP}
            one, many = (rows_per_second(width, **at, in_flight=number) for number in (1, 64))
            cells.append(f"{one:,.0f} to {many:,.0f}")
            numbers.append(str(needed_in_flight(width, **at)))
        speed.append(f"| {width:,} | {' | '.join(cells)} | {', '.join(numbers)} |")
    stays = {"1 hour": 3600, "6 hours": 21600, "1 day": 86400, "1 week": 604800}
    kept = " | ".join(["only the primary", *(f"`--replicas {number}`" for number in (1, 2, 3))])
    copies = [f"| volunteers stay | {kept} |", "|---|---:|---:|---:|---:|"]
    for name, stay in stays.items():
        lost = [experts_lost(number, stay=stay, repair=180) for number in (1, 2, 3, 4)]
        copies.append(f"| {name} | {' | '.join(f'{one:,.0f}' if one >= 10 else f'{one:.2g}' for one in lost)} |")
    sync = ["| width | state | 10 Mbit/s | 50 Mbit/s | 1 Gbit/s |", "|---:|---:|---:|---:|---:|"]
    for width in WIDTHS:
        least = [_time(least_sync(width, upload=rate * 1e6 / 8)) for rate in (10, 50, 1000)]
        sync.append(f"| {width:,} | {_size(state_bytes(width))} | {' | '.join(least)} |")
    return {"bandwidth": bandwidth, "speed": speed, "copies": copies, "sync": sync}


def with_tables(text: str) -> str:
    """Return the page with its tables as they follow from the formulas."""
    for name, lines in tables().items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n\n" + "\n".join(lines) + f"\n\n{end}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
