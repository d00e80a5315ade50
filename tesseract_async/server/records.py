"""Records: reads what the network holds about a server's experts of runs when that is wanted, and publishes it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from tesseract_async.errors import TesseractError, describe
from tesseract_async.experts.claiming import GRANT_SUBKEY
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.experts.manifest import split_uid
from tesseract_async.experts.tenure_words import State
from tesseract_async.experts.terms import RECORDS_SECONDS
from tesseract_async.network.entries import StoreItem
from tesseract_async.node import TesseractNode
from tesseract_async.server.other_replicas import MAX_SHARDS_READ, read_replicas, record_subkey
from tesseract_async.server.tenured import Tenured

logger = logging.getLogger(__name__)

TakeIn = Callable[[str, Sequence[ExpertReplica], Sequence[bytes]], Awaitable[None]]
"""Takes who else hosts an expert, and its records, by what the network says."""


class Records:
    def __init__(
        self,
        node: TesseractNode,
        experts: Mapping[str, Tenured],
        *,
        call_timeout: float,
        elapsed: Callable[[], float],
        take_in: TakeIn,
    ) -> None:
        self._node, self._experts, self._call_timeout = node, experts, call_timeout
        self._elapsed, self._take_in = elapsed, take_in
        self._shown: dict[str, tuple[bytes, float]] = {}  # by shard key: the grant that lies there, and until when
        self._wanted: set[str] = set()
        self._reading: set[str] = set()  # what is wanted of these meanwhile is read after that
        self.wants = asyncio.Event()
        """Set where something is wanted that is not being read."""

    def want(self, uid: str) -> None:
        """Ask for an expert to be read soon (`take_wanted`)."""
        self._wanted.add(uid)
        self.wants.set()

    def take_wanted(self) -> set[str]:
        """Return what is to be read now, by `read_wanted`: each by itself, so that the others do not wait for one."""
        self.wants.clear()
        uids = self._wanted - self._reading
        self._wanted -= uids
        self._reading |= uids
        return uids

    async def read_wanted(self, uids: Iterable[str]) -> None:
        left = set(uids)

        def was_read(uid: str) -> None:
            if uid in left:  # once: it may be wanted again, and read, before the others are here
                left.discard(uid)
                self._reading.discard(uid)
                if self._wanted:
                    self.wants.set()

        try:
            await self.read(uids, was_read)
        except (TesseractError, TimeoutError, OSError) as error:
            logger.info("who is primary could not be read: %s", describe(error))
        finally:
            for uid in list(left):
                was_read(uid)

    async def read(self, uids: Iterable[str], was_read: Callable[[str], None] = lambda uid: None) -> None:
        """Read who else hosts these, and their records; `was_read` is told of each.

        Raises: TimeoutError if the network does not answer.
        """
        began = self._elapsed()
        async with asyncio.timeout(self._call_timeout):
            if self._node.initial_peers and not await self._node.network.wait_joined(self._call_timeout):
                return  # alone for the moment: that nobody is seen says nothing
            wanted = set(uids)
            if len({self._node.trust.shard_key(uid) for uid in wanted}) > MAX_SHARDS_READ:  # the grid says what is new
                for uid, others in (await read_replicas(self._node, wanted)).items():
                    if not self._has_changed(uid, others):
                        wanted.discard(uid)
                        await self._take(uid, others, [], began)
                        was_read(uid)
            # each by itself: where one is late, the others are taken in
            await asyncio.gather(*(self._read_one(uid, was_read, began) for uid in wanted))

    async def _read_one(self, uid: str, was_read: Callable[[str], None], began: float) -> None:
        records: dict[str, list[bytes]] = {uid: []}
        others = (await read_replicas(self._node, [uid], by_shard=True, records=records))[uid]
        await self._take(uid, others, records[uid], began)
        was_read(uid)

    async def _take(self, uid: str, others: Sequence[ExpertReplica], records: Sequence[bytes], began: float) -> None:
        if self._elapsed() - began <= self._call_timeout:  # otherwise this computer slept, and others took over
            await self._take_in(uid, others, records)

    def _has_changed(self, uid: str, others: Iterable[ExpertReplica]) -> bool:
        if uid not in self._experts:
            return False
        tenure = self._experts[uid].tenure
        return tenure.state not in (State.PRIMARY, State.FOLLOWING) or any(o.epoch != tenure.epoch for o in others)

    async def publish(self, uid: str, records: Mapping[int, bytes]) -> None:
        """Store records by the numbers of `record_subkey`, with this node's grant. What cannot be stored is logged."""
        key = self._node.trust.shard_key(uid)
        named = [(record_subkey(uid, number), record) for number, record in records.items()]
        grant = self._node.trust.own_grant(split_uid(uid)[0])
        blob, until = self._shown.get(key, (b"", 0.0))
        if grant != blob or self._elapsed() >= until:
            # records outlive manifests: their readers must know that the signer might sign them
            self._shown[key] = grant, self._elapsed() + RECORDS_SECONDS / 2
            named += [(GRANT_SUBKEY, grant)] if grant else []
        try:
            items = [StoreItem(key, record, RECORDS_SECONDS, subkey) for subkey, record in named]
            await self._node.network.store_many(items)  # by one look-up
        except (TesseractError, TimeoutError, OSError) as error:
            logger.warning("records of %s could not be stored: %s", uid, describe(error))
