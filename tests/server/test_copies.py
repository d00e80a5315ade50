"""Copies count that show a state which the primary sealed."""

from random import Random
from types import SimpleNamespace
from typing import Any

from tesseract_async.endpoint.endpoint import Message
from tesseract_async.experts.pieces import root_of
from tesseract_async.experts.terms import Seal, TermKind, sign_seal, sign_term
from tesseract_async.server.fetching import find_shown
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import messages
from tests.experts.tenure_world import RUN, UID, identity

PRIMARY, LIAR = identity(1), identity(2)
TERM = sign_term(PRIMARY, RUN, uid=UID, epoch=100, boot=bytes(8), kind=TermKind.GENESIS)
FILES = {PRIMARY.peer_id: b"the state", LIAR.peer_id: b"what is not"}


def sealed(who: Any, number: int) -> Seal:
    data = FILES[who.peer_id]
    state = {"version": 1, "root": root_of(data), "size": len(data), "time": 100, "successors": []}
    return sign_seal(who, RUN, term=TERM, number=number, **state)


async def test_a_piece_of_what_another_signed_in_the_primarys_term_shows_nothing() -> None:
    shown = {"10.0.0.1:1": sealed(PRIMARY, 7), "10.0.0.2:1": sealed(LIAR, 9), "10.0.0.3:1": sealed(PRIMARY, 3)}

    async def call_expert(peer: PeerAddress, method: str, *_: Any, **__: Any) -> Message:
        seal = shown[peer.addresses[0]]
        if method == messages.TENURE:
            return Message(messages.encode(messages.TenureReply(False, [], [b"", seal.blob])))
        data = FILES[seal.primary]
        return Message(messages.encode(messages.StateReply(1, root_of(data), len(data), 0)), (memoryview(data),))

    peers = {identity(number).peer_id: PeerAddress(None, (where,)) for number, where in enumerate(shown, 10)}
    node: Any = SimpleNamespace(call_expert=call_expert)
    found = await find_shown(node, RUN, sealed(PRIMARY, 7), peers, timeout=1.0, random=Random(1))
    assert found == {identity(10).peer_id}
