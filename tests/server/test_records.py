"""What the network holds of a server's experts is read when it is wanted, each expert once at a time."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

from tesseract_async.network.address_scope import AddressScope
from tesseract_async.server.records import Records


def node_that_reads(get_entries: Callable[[str], Awaitable[list[Any]]]) -> Any:
    """A node, in a network of which only `get_entries` is known. What it asks for is an expert's uid, or "the grid"."""
    network = SimpleNamespace(get_entries=get_entries)
    trust = SimpleNamespace(shard_key=lambda uid: uid, grid_key=lambda prefix: "the grid")
    return SimpleNamespace(initial_peers=[], peer_id=None, network=network, trust=trust, scope=AddressScope())


async def test_an_expert_is_read_once_at_a_time_however_long_others_of_its_batch_take() -> None:
    network: defaultdict[str, asyncio.Queue[None]] = defaultdict(asyncio.Queue)
    under_way: set[str] = set()
    taken = asyncio.Event()

    async def get_entries(uid: str) -> list[Any]:
        assert uid not in under_way
        under_way.add(uid)
        await network[uid].get()
        under_way.discard(uid)
        return []

    async def take_in(uid: str, others: Any, records: Any) -> None:
        taken.set()

    records = Records(node_that_reads(get_entries), {}, call_timeout=60.0, elapsed=lambda: 0.0, take_in=take_in)

    def start(*uids: str) -> asyncio.Task[None]:
        for uid in uids:
            records.want(uid)
        assert records.take_wanted() == set(uids)
        return asyncio.create_task(records.read_wanted(set(uids)))

    first = start("ffn.0", "ffn.1")
    network["ffn.0"].put_nowait(None)
    await taken.wait()
    second = start("ffn.0")
    await asyncio.sleep(0)
    network["ffn.1"].put_nowait(None)
    await first
    records.want("ffn.0")
    assert not records.take_wanted(), "it is being read"
    records.wants.clear()
    network["ffn.0"].put_nowait(None)
    await second
    assert records.wants.is_set() and records.take_wanted() == {"ffn.0"}


async def test_what_was_read_before_this_computer_slept_is_not_taken_in() -> None:
    now, slept, taken = 0.0, 0.0, list[str]()

    async def get_entries(key: str) -> list[Any]:
        nonlocal now
        now += slept
        return []

    async def take_in(uid: str, others: Any, records: Any) -> None:
        taken.append(uid)

    records = Records(node_that_reads(get_entries), {}, call_timeout=5.0, elapsed=lambda: now, take_in=take_in)
    many = [f"ffn.{number}" for number in range(40)]  # read by the grid, where they are in many shards
    await records.read([*many, "ffn.0"])
    await records.read(["ffn.0"])
    assert sorted(taken) == sorted([*many, "ffn.0"])
    slept = 600.0
    await records.read(many)
    await records.read(["ffn.0"])
    assert len(taken) == len(many) + 1
