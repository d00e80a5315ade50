"""What things may cost, in counts that do not depend on the machine: one table.

A change that raises a cost by more than `MARGIN` fails its test. A lower limit is a commit of its own, which says what
lowered it; so is a higher one, with the reason.
"""

from typing import Final

MARGIN: Final = 0.03

LIMITS: Final[dict[str, float]] = {
    # one expert call of one row of 1,024 numbers, without gradients, over TLS, one at a time, on asyncio's loop
    "client: Python calls per small call": 163,
    "client: C calls per small call": 205,
    "server: Python calls per small call": 116,
    "server: C calls per small call": 157,
    "client: turns of the loop per small call": 2,
    "server: turns of the loop per small call": 2,
    # the same, eight at once
    "client: Python calls per small call of eight at once": 162,
    "client: C calls per small call of eight at once": 198,
    "server: Python calls per small call of eight at once": 77,
    "server: C calls per small call of eight at once": 98,
    # the same, one at a time, forward and backward; at the client all of it runs in the loop's thread
    "client: Python calls per forward and backward": 356,
    "server: Python calls per forward and backward": 302,
    "client: turns of the loop per forward and backward": 4,
    "server: turns of the loop per forward and backward": 4,
    # the package's own functions that such a call passes at its client and its server, each counted once
    "functions that a forward passes, both ends": 132,
    "files that a forward passes, both ends": 46,
    # and what travels and stays
    "frames per small call, both ways": 2,
    "bytes per small call, both ways": 8351,
    "allocations kept per small call": 0.3,  # none; timers and other sockets keep some meanwhile
    # eight such calls that wait while the device is busy
    "wake-ups of the loop per batch that ends": 1,
    "wake-ups of the device's thread until it idles again": 1,
    # a gate over 16 experts on 4 servers, 64 rows, k = 4
    "messages per gate pass, forward": 4,
    "messages per gate pass, backward": 4,
    # a pass of 32 experts on one server, 8 rows each, forward and backward, without TLS on asyncio's loop
    "caller: Python calls per expert of a pass, both ways": 81.6,
    "server: Python calls per expert of a pass, both ways": 97.25,
    "device: Python calls per expert of a pass, both ways": 36.5,
    # one row through eight of 32 experts, four on each of two servers; of the servers and their devices: both together
    "caller: Python calls per layer and token": 48,
    "caller's loop: Python calls per layer and token": 193,
    "servers: Python calls per layer and token": 398,
    "devices: Python calls per layer and token": 280,
    # experts of a checkpoint, of which others of their kind are here: made, and asked for the first time
    "checkpoint: Python calls per expert that is made": 115,
    "caller's loop: Python calls per expert of a layer, first pass": 30,
    "device: Python calls per expert, first pass": 137,
    # a hash table of 200 nodes
    "datagrams per look-up": 12.25,
    "datagrams per renewal": 86,
}


def check(name: str, measured: float) -> None:
    """Fail where a cost is above its limit."""
    limit = LIMITS[name]
    assert measured <= limit * (1 + MARGIN), f"{name}: {measured:g}, at most {limit:g} (tests/costs/limits.py)"
