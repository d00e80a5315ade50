"""Looks for a twin: a node with the same identity, such as a cloned machine (`docs/design/network.md`)."""

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable

from tesseract_async.errors import TesseractError, describe
from tesseract_async.network.network import TesseractNetwork

logger = logging.getLogger(__name__)

PERIOD = 30.0
"""Seconds between two looks, give or take a quarter."""
NUM_QUICK_LOOKS = 10
"""Looks at a sixth of the period that a newcomer takes whose identity is in use, or was until a moment ago."""
ADVICE = "give each computer a key of its own (`tesseract keygen FILE`), or stop one of the two"


class Presence:
    def __init__(self, network: TesseractNetwork, *, on_older_twin: Callable[[], None], period: float = PERIOD) -> None:
        """`on_older_twin` is called once, where this node is the one that has to withdraw."""
        self._network = network
        self._on_older_twin = on_older_twin
        self._period = period
        self._nonce, self._started = os.urandom(8), time.time()
        self._key = f"node/{network.peer_id}"
        self._sequence: int | None = None
        """The sequence of the entry that was written last."""
        self._told: set[bytes] = set()

    async def run(self) -> None:
        """Look until cancelled, or until an older twin was found."""
        await self._network.wait_joined()
        num_quick = 0
        while True:
            try:
                found = await self.look()
                if found == "older":
                    return
                if found == "before":
                    num_quick = NUM_QUICK_LOOKS
            except (TesseractError, TimeoutError, OSError, ConnectionError) as error:
                logger.debug("whether this identity is used elsewhere cannot be seen: %s", describe(error))
            num_quick -= 1
            await asyncio.sleep(self._period * random.uniform(0.75, 1.25) / (6 if num_quick > 0 else 1))

    async def look(self) -> str:
        """Read the entry, and write it.

        Return what was found: ``older``, ``younger`` (a twin), ``before`` (an entry of another run, which may be over)
        or nothing.
        """
        found = ""
        for entry in await self._network.get_entries(self._key):
            if entry.owner != self._network.peer_id or entry.subkey is not None:
                continue
            try:
                nonce, started = entry.value
                if nonce == self._nonce or not isinstance(nonce, bytes):
                    continue
                is_newer = self._sequence is not None and entry.sequence > self._sequence
                found = self._tell(nonce, float(started)) if is_newer else "before"
            except (TypeError, ValueError):
                continue
        if found != "older":
            if await self._network.store(self._key, [self._nonce, self._started], ttl=4 * self._period):
                self._sequence = self._network.last_sequence(self._key)
        return found

    def _tell(self, nonce: bytes, started: float) -> str:
        name = self._network.peer_id.short
        if (started, nonce) > (self._started, self._nonce):
            if nonce not in self._told:
                self._told.add(nonce)
                logger.error("another node was started with the identity of this one, %s: %s", name, ADVICE)
            return "younger"
        logger.error(
            "another node, started earlier, has the identity of this one, %s: this one withdraws from the network; %s",
            name,
            ADVICE,
        )
        self._on_older_twin()
        return "older"
