"""States in pieces: through a fake node that scripts what goes wrong, and through real ones."""

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
from tesseract_async.experts.pieces import PIECE_BYTES
from tesseract_async.server import checkpoint
from tesseract_async.server.checkpoint import EncodedState, check_state, difference, largest_state
from tesseract_async.server.fetching import MIN_RATE, NUM_RETRIES, fetch_state
from tesseract_async.server.state_files import SealedFiles
from tesseract_async.server.state_transfer import (
    KEEP_SECONDS,
    MAX_POINTS_A_MINUTE,
    MAX_RATE,
    MAX_WAITING,
    POINT_SECONDS,
    SealedState,
    StateSource,
)
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import messages
from tests.client.fake_node import until
from tests.client.virtual_time import in_made_up_time
from tests.server.serving_node import ServingNode

NOBODY = PeerAddress(None, ("127.0.0.1:9",))


def make_backend(width: int = 600) -> ta.ExpertBackend:
    torch.manual_seed(0)
    module = nn.Linear(width, width)
    return ta.ExpertBackend(
        module, optimizer=torch.optim.Adam(module.parameters()), args_schema=(ta.TensorSpec((width,)),)
    )


def train(backend: ta.ExpertBackend) -> None:
    (spec,) = backend.input_specs
    _, gradients = backend.gradients([torch.ones(1, *spec.shape)], [torch.ones(1, *spec.shape)])
    backend.step(gradients, [bytes(16)])


async def fetch(node: Any, peer: PeerAddress, *, weights_only: bool = False, **changes: Any) -> dict[str, Any] | None:
    file = await fetch_state(node, peer, "ffn.0", weights_only=weights_only, **changes)
    return None if file is None else check_state("ffn.0", file, weights_only=weights_only)


class StateNode(ServingNode):
    """Hosts the state of one expert; `before` may look at each request, or raise."""

    def __init__(self, *, max_bytes: int = 1 << 30, points_dir: Path | None = None) -> None:
        super().__init__()
        self.backend = make_backend()
        self.num_snapshots = 0
        self.requests: list[messages.StateRequest] = []
        self.before: Callable[[messages.StateRequest], None] = lambda request: None
        self.after: Callable[[Message], Message] = lambda reply: reply
        self.source = StateSource(self.aside, points_dir=points_dir)
        self.source.max_bytes = max_bytes
        self.host_expert("ffn.0", {messages.STATE: self.answer})

    @property
    def hosted(self) -> Any:
        return SimpleNamespace(
            uid="ffn.0", version=self.backend.version, snapshot=self.snapshot, structure=lambda: None
        )

    async def snapshot(self) -> dict[str, Any]:
        self.num_snapshots += 1
        return self.backend.state()

    async def aside(self, work: Callable[[], Any]) -> Any:
        await asyncio.sleep(0)
        return work()

    async def answer(self, call: IncomingCall) -> Message:
        request = messages.decode(messages.StateRequest, call.body)
        self.requests.append(request)
        self.before(request)
        return self.after(await self.source.answer(self.hosted, call))

    async def fetch(self, **changes: Any) -> dict[str, Any] | None:
        return await fetch(self, NOBODY, **changes)


@pytest.fixture
def node() -> Any:
    node = StateNode()
    yield node
    node.source.close()


async def test_a_peer_that_may_have_weights_alone_gets_no_sealed_state(tmp_path: Path) -> None:
    node, files = StateNode(), SealedFiles(tmp_path)
    file = files.keep("ffn.0", EncodedState(b"file", []))
    node.source.find_sealed = files.find
    for weights_only in (False, True):
        request = messages.StateRequest("ffn.0", weights_only, 0, file.root, 0)
        call = IncomingCall(ta.PeerID(bytes(32)), messages.STATE, messages.encode(request), (), 0.0, 0)
        reply = await node.source.answer(node.hosted, call)
        assert [bytes(part) for part in reply.buffers] == ([] if weights_only else [b"file"])


async def test_a_sealed_file_that_is_dropped_while_it_is_asked_for_is_not_there(tmp_path: Path) -> None:
    node, files = StateNode(), SealedFiles(tmp_path)
    file = files.keep("ffn.0", EncodedState(b"file", []))
    node.source.find_sealed = files.find
    file.path.unlink()
    request = messages.StateRequest("ffn.0", False, 0, file.root, 0)
    call = IncomingCall(ta.PeerID(bytes(32)), messages.STATE, messages.encode(request), (), 0.0, 0)
    reply = await node.source.answer(node.hosted, call)
    assert not reply.buffers and messages.decode(messages.StateReply, reply.body).size == 0


async def test_a_holder_of_a_sealed_state_gives_its_weights(tmp_path: Path) -> None:
    node, files = StateNode(), SealedFiles(tmp_path)
    train(node.backend)
    file = files.keep("ffn.0", checkpoint.encode_state(node.backend.state()))
    owner = SealedState("ffn.0", 1, file, node.aside)

    async def answer(call: IncomingCall) -> Message:
        return await node.source.answer(owner, call)

    node.host_expert("ffn.1", {messages.STATE: answer})
    weights = await fetch_state(node, NOBODY, "ffn.1", weights_only=True)
    assert weights is not None
    state = check_state("ffn.1", weights, weights_only=True)
    assert state["version"] == 1 and torch.equal(state["module"]["weight"], node.backend.module.weight)
    files.keep("ffn.0", EncodedState(b"what a primary that lies has sealed", []))
    owner = SealedState("ffn.0", 2, files.newest("ffn.0"), node.aside)  # type: ignore[arg-type]
    node.source.drop("ffn.0")
    with pytest.raises(ProtocolError, match="cannot be read"):
        await fetch_state(node, NOBODY, "ffn.1", weights_only=True)
    node.source.close()


async def test_a_copy_that_was_being_made_when_it_was_dropped_is_given_to_nobody_else(node: StateNode) -> None:
    """A follower asks just before the primary hands over: the heir must not get the follower's state, a step older."""
    release = asyncio.Event()

    async def aside(work: Callable[[], Any]) -> Any:
        await release.wait()
        return work()

    node.source = StateSource(aside)

    async def ask() -> int:
        request = messages.StateRequest("ffn.0", False, 0, messages.NO_ROOT, 0)
        call = IncomingCall(ta.PeerID(bytes(32)), messages.STATE, messages.encode(request), (), 0.0, 0)
        reply = await node.source.answer(node.hosted, call)
        return messages.decode(messages.StateReply, reply.body).version

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        follower = group.create_task(ask())
        await until(lambda: node.num_snapshots == 1)
        train(node.backend)  # the last step, after which the primary hands over
        node.source.drop("ffn.0")
        heir = group.create_task(ask())
        await until(lambda: node.num_snapshots == 2)
        release.set()
    assert (follower.result(), heir.result()) == (0, 1)
    assert await ask() == 1
    node.source.close()


@in_made_up_time
async def test_a_peer_that_asks_for_much_or_gives_up_takes_little_from_the_others(tmp_path: Path) -> None:
    node, files = StateNode(), SealedFiles(tmp_path)
    file = files.keep("ffn.0", EncodedState(bytes(4 * PIECE_BYTES), []))
    node.source.find_sealed = files.find
    body = messages.encode(messages.StateRequest("ffn.0", False, 0, file.root, 1))

    def ask(peer: bytes) -> asyncio.Task[Message]:
        call = IncomingCall(ta.PeerID(peer * 32), messages.STATE, body, (), 0.0, 0)
        return asyncio.create_task(node.source.answer(node.hosted, call))

    async def seconds() -> float:
        begin = asyncio.get_running_loop().time()
        await ask(b"b")
        return asyncio.get_running_loop().time() - begin

    greedy = [ask(b"a") for _ in range(1000)]
    assert await seconds() <= (MAX_WAITING + 2) * PIECE_BYTES / MAX_RATE
    answers = await asyncio.gather(*greedy, return_exceptions=True)
    assert sum(isinstance(one, Overloaded) for one in answers) == 1000 - MAX_WAITING
    for _ in range(20):
        tasks = [ask(b"a") for _ in range(MAX_WAITING)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert await seconds() <= 22 * PIECE_BYTES / MAX_RATE


@in_made_up_time
async def test_save_points_are_few_and_hold_what_was_there(tmp_path: Path) -> None:
    node = StateNode(points_dir=tmp_path)

    async def ask(peer: bytes, point: int) -> int:
        request = messages.StateRequest("ffn.0", True, 0, messages.NO_ROOT, 0, point.to_bytes(16, "big"))
        call = IncomingCall(ta.PeerID(peer * 32), messages.STATE, messages.encode(request), (), 0.0, 0)
        reply = await node.source.answer(node.hosted, call)
        return messages.decode(messages.StateReply, reply.body).version

    def num_files() -> int:
        return len(list(tmp_path.rglob("*.point")))

    assert await ask(b"a", 1) == 0
    train(node.backend)
    assert (await ask(b"a", 1), await ask(b"b", 1), num_files()) == (0, 1, 2)
    with pytest.raises(Overloaded, match="being fetched already"):
        await ask(b"c", 1)
    for point in range(2, MAX_POINTS_A_MINUTE + 1):  # of one peer the last is kept
        assert await ask(b"a", point) == 1 and num_files() == 2
    with pytest.raises(Overloaded, match="too many save points") as refused:
        await ask(b"a", 100)
    assert await ask(b"a", MAX_POINTS_A_MINUTE) == 1 and node.num_snapshots == MAX_POINTS_A_MINUTE + 1
    await asyncio.sleep(refused.value.retry_after + 0.1)
    assert await ask(b"a", 100) == 1
    await asyncio.sleep(POINT_SECONDS + 1)
    assert await ask(b"c", 1) == 1 and num_files() == 1
    await asyncio.sleep(POINT_SECONDS + 2 * KEEP_SECONDS)  # it is never fetched to the end
    assert not num_files()
    assert await ask(b"c", 2) == 1 and num_files() == 1
    node.source.close()
    assert not num_files()


async def test_a_piece_that_a_file_does_not_have(node: StateNode) -> None:
    size = 3 * PIECE_BYTES + 5
    sealed = SealedFiles(None)
    big, small = sealed.keep("big", EncodedState(bytes(size), [])), sealed.keep("small", EncodedState(b"s", []))
    node.source.find_sealed = lambda uid, root: {big.root: big, small.root: small}[root]
    for root, piece in ((big.root, 5), (big.root, 2**40), (small.root, 1)):
        request = messages.StateRequest("ffn.0", False, 0, root, piece)
        with pytest.raises(ProtocolError, match="has no piece"):
            await node.call("ffn.0", messages.STATE, messages.encode(request))
    sealed.close()


async def test_a_state_arrives_whole_and_loads(node: StateNode) -> None:
    train(node.backend)
    state = await node.fetch()
    assert state is not None
    assert len(node.requests) == 6, "a list, and the pieces of 4.1 MiB"
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


@in_made_up_time
async def test_a_broken_connection_goes_on_where_it_stopped() -> None:
    node, lost = StateNode(), list[int]()
    train(node.backend)

    def break_twice(request: messages.StateRequest) -> None:
        if request.piece == 3 and len(lost) < 2:
            lost.append(request.piece)
            raise ConnectionLost("the server", "for the test")

    node.before = break_twice
    assert await node.fetch() is not None
    pieces = [request.piece for request in node.requests]
    assert lost == [3, 3] and sorted(pieces) == sorted([*range(max(pieces) + 1), 3, 3])
    assert node.num_snapshots == 1
    node.source.close()


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
    assert [request.piece for request in node.requests].count(0) == 2


async def test_a_server_that_always_begins_again_is_left(node: StateNode) -> None:
    def lose_it(request: messages.StateRequest) -> None:
        if request.piece:
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
        ({"piece": 7}, "another piece"),
        ({"size": 10}, "wrong piece"),
        ({"size": 0}, "does not fit"),
        ({"root": b"x" * 32}, "wrong piece"),
        ({"root": "x"}, "malformed"),
        ({"version": -1}, "malformed"),
    ],
)
async def test_a_lying_server_is_found_out(node: StateNode, change: dict[str, Any], sentence: str) -> None:
    node.after = lambda reply: changed(reply, **change)
    with pytest.raises(ProtocolError, match=sentence):
        await node.fetch()


@pytest.mark.parametrize("piece", [0, 1, 2])
async def test_a_flipped_bit_is_noticed_before_the_file_is_looked_into(node: StateNode, piece: int) -> None:
    def flip(reply: Message) -> Message:
        data = bytearray(reply.buffers[0])
        data[-1] ^= messages.StateReply(*reply.body).piece == piece
        return Message(reply.body, (memoryview(data),))

    train(node.backend)
    node.after = flip
    with pytest.raises(ProtocolError, match="wrong piece"):
        await node.fetch()


@pytest.mark.parametrize("part", [b"more", b""])
async def test_pieces_of_the_wrong_length_are_refused(node: StateNode, part: bytes) -> None:
    node.after = lambda reply: Message(reply.body, (memoryview(part),))
    with pytest.raises(ProtocolError, match="wrong piece"):
        await node.fetch()
    node.after = lambda reply: Message(reply.body, (*reply.buffers, memoryview(part)))
    with pytest.raises(ProtocolError, match="does not fit"):
        await node.fetch()


GOOD = b"".join(checkpoint.encode_state(make_backend(16).state()))


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
        file = b"".join(checkpoint.encode_state({**state, **change}))
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
    assert b"".join(checkpoint.encode_state(state)) == GOOD


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
    fake = StateNode()
    async with ta.TesseractNode() as host, ta.TesseractNode() as guest:

        async def answer(call: IncomingCall) -> Message:
            return await fake.source.answer(fake.hosted, call)

        host.host_expert("ffn.0", {messages.STATE: answer})
        state = await fetch(guest, host.peer_address, timeout=30.0)
        assert state is not None and torch.equal(state["module"]["weight"], fake.backend.module.weight)  # type: ignore[arg-type]
        fake.source.close()


@in_made_up_time
async def test_a_source_that_drips_is_left() -> None:
    """Each piece comes in time, one after the other, but the whole later than so many bytes may take."""
    node, turn, loop = StateNode(), asyncio.Lock(), asyncio.get_running_loop()
    train(node.backend)
    answer, begin = node.answer, loop.time()

    async def late(call: IncomingCall) -> Message:
        async with turn:
            await asyncio.sleep(40.0)
            return await answer(call)

    node.unhost_expert("ffn.0")
    node.host_expert("ffn.0", {messages.STATE: late})
    with pytest.raises(TimeoutError):
        await node.fetch(timeout=41.0)
    assert loop.time() - begin < 41 + 41 + (5 << 20) / MIN_RATE
    node.source.close()


async def test_no_more_is_fetched_than_a_state_of_this_expert_can_have(node: StateNode) -> None:
    for _ in range(3):
        train(node.backend)
    limit = largest_state(node.backend)
    assert len(b"".join(checkpoint.encode_state(node.backend.state()))) < limit < 16 << 20
    node.after = lambda reply: changed(reply, size=limit + 1)
    with pytest.raises(ProtocolError, match="at most"):
        await node.fetch(max_bytes=limit)


def test_the_first_difference_is_said_in_a_sentence(node: StateNode) -> None:
    state = node.backend.state()
    assert difference("ffn.0", node.backend, state) is None
    state["module"]["weight"] = torch.zeros(3, 600)
    said = difference("ffn.0", node.backend, state)
    assert said == "ffn.0: its weight weight has shape [3, 600] there and shape [600, 600] here"
    del state["module"]["weight"]
    assert "has none there" in str(difference("ffn.0", node.backend, state))
