"""Copies of an expert's state: do those that say they have one show it?"""

import asyncio
import logging
from collections.abc import Mapping
from random import Random

from tesseract_async.errors import ProtocolError, TesseractError, describe
from tesseract_async.experts.merkle import num_leaves
from tesseract_async.experts.own_term import MAX_BEHIND
from tesseract_async.experts.pieces import LIST, PieceFetch, split_list
from tesseract_async.experts.terms import Seal, read_seal
from tesseract_async.identity import PeerID
from tesseract_async.node import TesseractNode
from tesseract_async.server.fetching import ask_piece
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import messages

logger = logging.getLogger(__name__)


async def ask_records(node: TesseractNode, uid: str, peer: PeerAddress, *, timeout: float) -> list[bytes]:
    """Return the Term by which a member goes, and the Seal whose file it says it has: untrusted, and unread.

    Raises: as `TesseractNode.call_expert`.
    """
    question = messages.encode(messages.TenureRequest(uid, "probe", 0, [b"", b"", b""]))
    reply = await node.call_expert(peer, messages.TENURE, question, timeout=timeout, idempotent=True)
    return messages.decode(messages.TenureReply, reply.body).records


async def ask_seal(node: TesseractNode, run: bytes, uid: str, peer: PeerAddress, *, timeout: float) -> Seal:
    """Return the Seal whose file a member says it has. Raises: as `ask_records`; ProtocolError if it shows none."""
    seal = read_seal([*await ask_records(node, uid, peer, timeout=timeout), b"", b""][1], run)
    if seal.uid != uid:
        raise ProtocolError(f"{peer.short} shows the Seal of another expert than {uid}")
    return seal


async def find_shown(
    node: TesseractNode,
    run: bytes,
    newest: Seal,
    peers: Mapping[PeerID, PeerAddress],
    *,
    timeout: float,
    random: Random,
) -> set[PeerID]:
    """Return those of the `peers` that show a random piece of a file which the primary of `newest` sealed lately."""
    uid = newest.uid

    async def shows(address: PeerAddress) -> bool:
        try:
            seal = await ask_seal(node, run, uid, address, timeout=timeout)
            if (seal.primary, seal.term) != (newest.primary, newest.term) or seal.number < newest.number - MAX_BEHIND:
                raise ProtocolError(f"{address.short} has an old state of {uid}, or one that its primary did not seal")
            plan: PieceFetch[PeerAddress] = PieceFetch(seal.root, seal.size, silence=timeout)
            hashes = await ask(address, plan, LIST)
            if num_leaves(seal.size) > 1:
                plan.take_list(split_list(hashes))
                await ask(address, plan, random.randrange(1, len(plan.leaves) + 1))
        except (TesseractError, TimeoutError, OSError) as error:
            logger.info("%s does not show the state of %s: %s", address.short, uid, describe(error))
            return False
        return True

    async def ask(address: PeerAddress, plan: PieceFetch[PeerAddress], piece: int) -> memoryview:
        request = messages.StateRequest(uid, False, 0, plan.root, piece)
        _, data = await ask_piece(node, address, request, timeout=timeout)
        if not plan.is_right(piece, data):
            raise ProtocolError(f"{address.short} sent a wrong piece of the state of {uid}")
        return data

    found = await asyncio.gather(*map(shows, peers.values()))
    return {peer for peer, is_shown in zip(peers, found, strict=True) if is_shown}
