"""States in pieces: through a fake node that scripts what goes wrong, and through real ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tesseract_async as ta
from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import ConnectionLost, Overloaded, ProtocolError
from tesseract_async.server import checkpoint
from tesseract_async.server.checkpoint import check_state, difference, largest_state
from tesseract_async.server.state_files import SealedFile
from tesseract_async.server.state_transfer import (
    KEEP_SECONDS,
    MIN_PIECE_BYTES,
    NO_DIGEST,
    NUM_RETRIES,
    StateSource,
    fetch_file,
)
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import messages
from tests.client.virtual_time import in_made_up_time
from tests.server.serving_node import ServingNode

NOBODY = PeerAddress(None, ("127.0.0.1:9",))
PIECE = MIN_PIECE_BYTES


def make_backend(width: int = 320) -> ta.ExpertBackend:
    torch.manual_seed(0)
    module = nn.Linear(width, width)
    return ta.ExpertBackend(
        module, optimizer=torch.optim.Adam(module.parameters()), args_schema=(ta.TensorSpec((width,)),)
    )


def train(backend: ta.ExpertBackend) -> None:
    (spec,) = backend.input_specs
    _, gradients = backend.gradients([torch.ones(1, *spec.shape)], [torch.ones(1, *spec.shape)])
    backend.step(gradients, [bytes(16)])


async def fetch_state(
    node: Any, peer: PeerAddress, *, weights_only: bool = False, **changes: Any
) -> dict[str, Any] | None:
    file = await fetch_file(node, peer, "ffn.0", weights_only=weights_only, **changes)
    return None if file is None else check_state("ffn.0", file, weights_only=weights_only)


class StateNode(ServingNode):
    """Hosts the state of one expert; `before` may look at each request, or raise."""

    def __init__(self, *, piece_bytes: int = PIECE, max_bytes: int = 1 << 30) -> None:
        super().__init__()
        self.backend = make_backend()
        self.num_snapshots = 0
        self.requests: list[messages.StateRequest] = []
        self.before: Callable[[messages.StateRequest], None] = lambda request: None
        self.after: Callable[[Message], Message] = lambda reply: reply
        self.source = StateSource(self.aside, max_bytes=max_bytes, piece_bytes=piece_bytes)
        self.host_expert("ffn.0", {messages.STATE: self.answer})

    @property
    def hosted(self) -> Any:
        return SimpleNamespace(uid="ffn.0", backend=self.backend, snapshot=self.snapshot)

    async def snapshot(self) -> dict[str, Any]:
        self.num_snapshots += 1
        return self.backend.state()

    async def aside(self, work: Callable[[], bytes]) -> bytes:
        await asyncio.sleep(0)
        return work()

    async def answer(self, call: IncomingCall) -> Message:
        request = messages.decode(messages.StateRequest, call.body)
        self.requests.append(request)
        self.before(request)
        return self.after(await self.source.answer(self.hosted, call))

    async def fetch(self, **changes: Any) -> dict[str, Any] | None:
        return await fetch_state(self, NOBODY, **changes)


@pytest.fixture
def node() -> Any:
    node = StateNode()
    yield node
    node.source.close()


async def test_whoever_may_have_weights_alone_gets_no_sealed_state(tmp_path: Path) -> None:
    node = StateNode()
    (tmp_path / "file").write_bytes(b"file")
    node.source.find_sealed = lambda uid, digest: SealedFile(bytes(32), 4, tmp_path / "file")
    for weights_only in (False, True):
        request = messages.StateRequest("ffn.0", weights_only, 0, b"d" * 16, 0)
        body = messages.encode(request)
        call = IncomingCall(ta.PeerID(bytes(32)), messages.STATE, body, (), 0.0, 0)
        reply = await node.source.answer(node.hosted, call)
        assert (bytes(reply.buffers[0]) == b"file") is not weights_only


async def test_a_state_arrives_whole_and_loads(node: StateNode) -> None:
    train(node.backend)
    state = await node.fetch()
    assert state is not None
    assert len(node.requests) > 5
    assert node.num_snapshots == 1
    other = make_backend()
    other.load_state(state)
    assert other.version == 1
    assert all(
        torch.equal(a, b) for a, b in zip(other.module.parameters(), node.backend.module.parameters(), strict=True)
    )
    assert other.applied == node.backend.applied
    node.source.close()


async def test_weights_alone_are_smaller(node: StateNode) -> None:
    train(node.backend)
    state = await node.fetch(weights_only=True)
    assert state is not None and set(state) == {"module", "version"}


async def test_nothing_is_sent_before_the_version_is_reached(node: StateNode) -> None:
    assert await node.fetch(min_version=1) is None
    assert node.num_snapshots == 0
    train(node.backend)
    assert (await node.fetch(min_version=1) or {})["version"] == 1


async def test_a_broken_connection_goes_on_where_it_stopped(node: StateNode) -> None:
    lost: list[int] = []

    def break_twice(request: messages.StateRequest) -> None:
        if request.offset >= 2 * PIECE and len(lost) < 2:
            lost.append(request.offset)
            raise ConnectionLost("the server", "for the test")

    node.before = break_twice
    assert await node.fetch() is not None
    offsets = [request.offset for request in node.requests]
    assert lost == [2 * PIECE, 2 * PIECE]
    assert offsets == [0, PIECE, *lost, *range(2 * PIECE, offsets[-1] + 1, PIECE)]
    assert node.num_snapshots == 1


async def test_it_gives_up_after_some_broken_connections(node: StateNode) -> None:
    def always(request: messages.StateRequest) -> None:
        raise ConnectionLost("the server", "for the test")

    node.before = always
    with pytest.raises(ConnectionLost):
        await node.fetch()
    assert len(node.requests) == NUM_RETRIES + 1


async def test_training_goes_on_meanwhile_and_does_not_mix_versions(node: StateNode) -> None:
    node.before = lambda request: train(node.backend)
    state = await node.fetch()
    assert state is not None and state["version"] == 1
    assert node.num_snapshots == 1


async def test_a_copy_that_is_gone_means_beginning_again(node: StateNode) -> None:
    def lose_it(request: messages.StateRequest) -> None:
        if len(node.requests) == 3:
            train(node.backend)
            node.source.close()

    node.before = lose_it
    state = await node.fetch()
    assert state is not None and state["version"] == 1
    assert [request.offset for request in node.requests[:4]] == [0, PIECE, 2 * PIECE, PIECE]


async def test_a_server_that_always_begins_again_is_left(node: StateNode) -> None:
    def lose_it(request: messages.StateRequest) -> None:
        if request.offset:
            train(node.backend)
            node.source.close()

    node.before = lose_it
    with pytest.raises(ProtocolError, match="faster than it sends"):
        await node.fetch()


async def test_many_who_come_together_share_one_copy(node: StateNode) -> None:
    states = await asyncio.gather(*(node.fetch() for _ in range(5)))
    assert all(state is not None for state in states)
    assert node.num_snapshots == 1


@in_made_up_time
async def test_copies_are_dropped_when_nobody_asks_and_bounded() -> None:
    node = StateNode()
    await node.fetch()
    assert node.source.copy_of("ffn.0") is not None
    await asyncio.sleep(4 * KEEP_SECONDS)  # made-up time
    assert node.source.copy_of("ffn.0") is None
    full = StateNode(max_bytes=1)
    await full.fetch()
    with pytest.raises(Overloaded):
        await full.fetch(weights_only=True)
    full.source.close()


def changed(reply: Message, **change: Any) -> Message:
    return Message(list(messages.StateReply(*reply.body)._replace(**change)), reply.buffers)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"size": 10**12}, "at most"),
        ({"offset": 7}, "does not fit"),
        ({"size": 10}, "does not fit"),
        ({"digest": b"x" * 16}, "does not fit"),
        ({"digest": "x"}, "malformed"),
        ({"version": -1}, "malformed"),
    ],
)
async def test_a_lying_server_is_found_out(node: StateNode, change: dict[str, Any], sentence: str) -> None:
    node.after = lambda reply: changed(reply, **change)
    with pytest.raises(ProtocolError, match=sentence):
        await node.fetch()


async def test_a_flipped_bit_is_noticed_before_the_file_is_looked_into(node: StateNode) -> None:
    def flip(reply: Message) -> Message:
        piece = bytearray(reply.buffers[0])
        piece[-1] ^= 1
        return Message(reply.body, (memoryview(piece),))

    node.after = flip
    with pytest.raises(ProtocolError, match="damaged on the way"):
        await node.fetch()


async def test_a_piece_too_many_or_empty_is_refused(node: StateNode) -> None:
    node.after = lambda reply: Message(reply.body, (*reply.buffers, memoryview(b"more")))
    with pytest.raises(ProtocolError, match="does not fit"):
        await node.fetch()
    node.after = lambda reply: Message(reply.body, (memoryview(b""),))
    with pytest.raises(ProtocolError, match="does not fit"):
        await node.fetch()


GOOD = b"".join(checkpoint.encode(make_backend(16).state()))


def test_what_a_state_must_hold() -> None:
    assert check_state("ffn.0", GOOD)["version"] == 0
    state = make_backend(16).state()
    for change in (
        {"version": "1"},
        {"version": -1},
        {"module": 3},
        {"module": {"a": 1}},
        {"optimizer": 3},
        {"applied": 3},
    ):
        file = b"".join(checkpoint.encode({**state, **change}))
        with pytest.raises(ProtocolError, match="ffn.0"):
            check_state("ffn.0", file)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255), st.booleans())
def test_a_damaged_state_raises_one_error_only(at: int, flip: int, cut: bool) -> None:
    data = bytearray(GOOD)
    data[at] ^= flip
    try:
        state = check_state("ffn.0", bytes(data[:at] if cut else data))
    except ProtocolError:
        return
    # a space of the header that became another kind of space
    assert b"".join(checkpoint.encode(state)) == GOOD


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_raise_one_error_only(data: bytes) -> None:
    for file in (data, len(data).to_bytes(8, "little") + data):
        with pytest.raises(ProtocolError):
            check_state("ffn.0", file)


def test_deep_nesting_raises_one_error_only() -> None:
    deep = b'{"__metadata__":' + b"[" * 100_000
    with pytest.raises(ProtocolError):
        check_state("ffn.0", len(deep).to_bytes(8, "little") + deep)


@pytest.mark.both_loops
async def test_between_two_nodes() -> None:
    fake = StateNode(piece_bytes=100_000)
    async with ta.TesseractNode() as host, ta.TesseractNode() as guest:

        async def answer(call: IncomingCall) -> Message:
            return await fake.source.answer(fake.hosted, call)

        host.host_expert("ffn.0", {messages.STATE: answer})
        state = await fetch_state(guest, host.peer_address, timeout=30.0)
        assert state is not None and torch.equal(state["module"]["weight"], fake.backend.module.weight)  # type: ignore[arg-type]
        fake.source.close()
    assert NO_DIGEST == bytes(16)


async def test_a_source_that_drips_is_left(node: StateNode, monkeypatch: pytest.MonkeyPatch) -> None:
    train(node.backend)
    node.after = lambda reply: Message(reply.body, (reply.buffers[0][:10],))
    with pytest.raises(ProtocolError, match="does not fit"):
        await node.fetch()
    # or one whose pieces are whole, and late: the whole has a time, by its size
    node.after = lambda reply: reply
    loop = asyncio.get_running_loop()
    late, now = [0.0], loop.time
    monkeypatch.setattr(loop, "time", lambda: now() + late[0])

    def wait(request: messages.StateRequest) -> None:
        late[0] += 9.0

    node.before = wait
    with pytest.raises(TimeoutError, match="too slowly"):
        await node.fetch(timeout=10.0)
    assert len(node.requests) < 8, "of the 19 pieces that it has"


async def test_no_more_is_fetched_than_a_state_of_this_expert_can_have(node: StateNode) -> None:
    for _ in range(3):
        train(node.backend)
    limit = largest_state(node.backend)
    assert len(b"".join(checkpoint.encode(node.backend.state()))) < limit < 8 << 20
    node.after = lambda reply: changed(reply, size=limit + 1)
    with pytest.raises(ProtocolError, match="at most"):
        await fetch_file(node, NOBODY, "ffn.0", max_bytes=limit)  # type: ignore[arg-type]


def test_the_first_difference_is_said_in_a_sentence(node: StateNode) -> None:
    state = node.backend.state()
    assert difference("ffn.0", node.backend, state) is None
    state["module"]["weight"] = torch.zeros(3, 320)
    said = difference("ffn.0", node.backend, state)
    assert said == "ffn.0: its weight weight has shape [3, 320] there and shape [320, 320] here"
    del state["module"]["weight"]
    assert "has none there" in str(difference("ffn.0", node.backend, state))
