"""hivemind's side of the DHT load (`loads.DhtLoad`), through its public API; runs in hivemind's own environment."""

import asyncio
import random
import time
import uuid

import hivemind
from hivemind.utils.timed_storage import get_dht_time

from tests.benchmarks.figures import emit
from tests.benchmarks.loads import DhtLoad


def start_nodes(load: DhtLoad, rng: random.Random) -> list[hivemind.DHT]:
    """`num_nodes` nodes, each a process and a daemon of its own; each knows a few of those before it."""
    nodes: list[hivemind.DHT] = []
    for _ in range(load.num_nodes):
        seeds = rng.sample(nodes, min(load.num_seeds, len(nodes)))
        addresses = [str(address) for seed in seeds for address in seed.get_visible_maddrs()]
        nodes.append(hivemind.DHT(initial_peers=addresses, start=True))
    return nodes


async def run(load: DhtLoad) -> None:
    rng = random.Random(11)
    nodes = start_nodes(load, rng)
    try:
        doomed = rng.sample(nodes, load.num_killed)
        used = [node for node in nodes if node not in doomed]
        num_rounds = load.num_workers * load.num_rounds
        rounds = iter(range(num_rounds))
        stored = found = 0

        async def one_round() -> None:
            nonlocal stored, found
            key, expiration = uuid.uuid4().hex, get_dht_time() + load.ttl
            values = {uuid.uuid4().hex: uuid.uuid4().hex for _ in range(load.num_stores)}
            done = await asyncio.gather(
                *(
                    node.store(key, value, expiration, subkey=subkey, return_future=True)
                    for node, (subkey, value) in zip(rng.sample(used, load.num_stores), values.items(), strict=True)
                )
            )
            stored += sum(done)
            if next(rounds) == num_rounds // 3:
                for node in doomed:
                    node.kill()
            answers = await asyncio.gather(
                *(node.get(key, latest=True, return_future=True) for node in rng.sample(used, load.num_gets))
            )
            for answer in answers:
                entries = {} if answer is None else answer.value
                found += {subkey: entry.value for subkey, entry in entries.items()} == values

        async def worker() -> None:
            for _ in range(load.num_rounds):
                await one_round()

        begin = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(load.num_workers)))
        seconds = time.perf_counter() - begin
        half = load.num_operations / 2
        emit(
            "dht 16 nodes",
            load.num_operations / seconds,
            "operations/s",
            stored_share=stored / half,
            complete_share=found / half,
            seconds=seconds,
        )
    finally:
        for node in nodes:
            node.shutdown()


def main() -> None:
    asyncio.run(run(DhtLoad()))


if __name__ == "__main__":
    main()
