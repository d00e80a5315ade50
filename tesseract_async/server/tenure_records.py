"""The Terms and Seals of a server's experts in the DHT, and which servers host them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from tesseract_async.errors import TesseractError, describe
from tesseract_async.experts.claiming import GRANT_SUBKEY
from tesseract_async.experts.manifest import MAGIC, split_uid
from tesseract_async.identity import PeerID
from tesseract_async.server.other_replicas import MAX_SHARDS_READ, owner_of, read_replicas
from tesseract_async.transport.base import PeerAddress

if TYPE_CHECKING:
    from tesseract_async.network.entries import Entries
    from tesseract_async.node import TesseractNode

logger = logging.getLogger(__name__)

RECORDS_TTL: Final = 24 * 3600.0
LONGEST_SUBKEY: Final = 120


class Seen(NamedTuple):
    """One expert as the network shows it."""

    hosts: dict[PeerID, int]
    """The other servers that host it, and the epochs that they go by."""
    records: list[bytes]
    """Terms and Seals, unchecked, of servers that may host it."""


class TenureRecords:
    """Publishes and reads them under the experts' shard keys."""

    def __init__(self, node: TesseractNode, *, clock: Callable[[], float], elapsed: Callable[[], float]) -> None:
        self.addresses: dict[PeerID, PeerAddress] = {}
        """Servers that were found to host one of the experts."""
        self._node, self._clock, self._elapsed = node, clock, elapsed
        self._shown: dict[str, tuple[bytes, float]] = {}  # by key: the grant that lies there, and until when

    async def publish(self, uid: str, records: Sequence[bytes]) -> None:
        """Store a Term, and its Seal if there is one, with this node's grant. What cannot be stored is logged."""
        key = self._node.trust.shard_key(uid)
        named = [(record_subkey(uid, number), record) for number, record in enumerate(records)]
        grant = self._node.trust.own_grant(split_uid(uid)[0])
        blob, until = self._shown.get(key, (b"", 0.0))
        if grant != blob or self._elapsed() >= until:
            # records outlive manifests: their readers must know that the signer might sign them
            self._shown[key] = grant, self._elapsed() + RECORDS_TTL / 2
            named += [(GRANT_SUBKEY, grant)] if grant else []
        for subkey, record in named:
            try:
                await self._node.network.store(key, record, ttl=RECORDS_TTL, subkey=subkey)
            except (TesseractError, TimeoutError, OSError) as error:
                logger.warning("a record of %s could not be stored: %s", uid, describe(error))

    async def read(
        self, uids: Collection[str], has_changed: Callable[[str, Mapping[PeerID, int]], bool]
    ) -> dict[str, Seen]:
        """Return what the network holds of these experts.

        Of more than lie in `MAX_SHARDS_READ` shards, the grid is read first, and then the shards of those for which
        `has_changed` says yes to their hosts.
        """
        trust, now = self._node.trust, self._clock()
        seen = {uid: Seen({}, []) for uid in uids}
        subkeys = {record_subkey(uid, number): uid for uid in uids for number in (0, 1)}

        def take_records(entries: Entries) -> None:
            for entry in entries:
                if entry.subkey == GRANT_SUBKEY and type(entry.value) is bytes:
                    trust.introduced(entry.owner, [entry.value])
            for entry in entries:
                uid = subkeys.get(entry.subkey or "")
                if uid is None or entry.expiration <= now or type(entry.value) is not bytes:
                    continue
                # what others store costs no signature check
                if not entry.value.startswith(MAGIC) and trust.may_host(entry.owner, uid):
                    seen[uid].records.append(entry.value)

        async def read(some: Collection[str], *, by_shard: bool) -> None:
            replicas = await read_replicas(self._node, some, clock=self._clock, by_shard=by_shard, also=take_records)
            for uid, others in replicas.items():
                for one in others:
                    seen[uid].hosts[owner_of(one)] = one.epoch
                    self.addresses[owner_of(one)] = one.peer

        await read(uids, by_shard=False)
        if len({trust.shard_key(uid) for uid in uids}) > MAX_SHARDS_READ:
            await read([uid for uid in uids if has_changed(uid, seen[uid].hosts)], by_shard=True)
        return seen


def record_subkey(uid: str, number: int) -> str:
    """Return the subkey of an expert's Term (0) or Seal (1)."""
    return f"{'ts'[number > 0]}.{uid}"[:LONGEST_SUBKEY]
