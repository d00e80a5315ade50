"""Copies count that show a state which the primary sealed."""

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from tesseract_async.experts.pieces import root_of
from tesseract_async.experts.terms import Seal, TermKind, sign_seal, sign_term
from tesseract_async.server.fetching import find_shown
from tesseract_async.transport.base import PeerAddress
from tests.experts.tenure_world import RUN, UID, identity

PRIMARY, LIAR = identity(1), identity(2)
TERM = sign_term(PRIMARY, RUN, uid=UID, epoch=100, boot=bytes(8), kind=TermKind.GENESIS)
FILES = {PRIMARY.peer_id: b"the state", LIAR.peer_id: b"what is not"}


def sealed(who: Any, number: int) -> Seal:
    data = FILES[who.peer_id]
    state = {"version": 1, "root": root_of(data), "size": len(data), "time": 100, "successors": []}
    return sign_seal(who, RUN, term=TERM, number=number, **state)


async def test_a_piece_of_what_another_signed_in_the_primarys_term_shows_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = {"10.0.0.1:1": sealed(PRIMARY, 7), "10.0.0.2:1": sealed(LIAR, 9), "10.0.0.3:1": sealed(PRIMARY, 3)}

    async def ask_seal(node: Any, run: bytes, uid: str, peer: PeerAddress, *, timeout: float) -> Seal:
        return shown[peer.addresses[0]]

    async def ask_piece(node: Any, peer: PeerAddress, request: Any, *, timeout: float) -> tuple[None, memoryview]:
        return None, memoryview(FILES[shown[peer.addresses[0]].primary])

    monkeypatch.setattr("tesseract_async.server.fetching.ask_seal", ask_seal)
    monkeypatch.setattr("tesseract_async.server.fetching.ask_piece", ask_piece)
    peers = {identity(number).peer_id: PeerAddress(None, (where,)) for number, where in enumerate(shown, 10)}
    node: Any = SimpleNamespace()
    found = await find_shown(node, RUN, sealed(PRIMARY, 7), peers, timeout=1.0, random=Random(1))
    assert found == {identity(10).peer_id}
