"""Whatever bytes a peer sends, decoders raise `ProtocolError` or nothing. Seeded; slowly, a million inputs."""

import random
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
import torch

from tesseract_async.admission import Policy, Quota
from tesseract_async.endpoint.bounds import Bounds
from tesseract_async.endpoint.budget import NodeBudgets, Owner, Reservation
from tesseract_async.endpoint.events import CallReceived, PartReceived, PartWanted
from tesseract_async.endpoint.protocol import ConnectionProtocol
from tesseract_async.endpoint.quotas import Quotas
from tesseract_async.errors import ConnectionLost, NotAllowed, ProtocolError
from tesseract_async.identity import Identity
from tesseract_async.transport.certificates import make_contexts
from tesseract_async.transport.tls import TlsMachine
from tesseract_async.wire import apply, compression, frames, heads, messages, tensors
from tesseract_async.wire.heads import Hello, RequestHead
from tests.endpoint.machines import taken
from tests.wire.test_apply import sample as apply_sample

SETTINGS = Bounds(max_message=2**22, max_calls=50, max_replies=2**18)
HELLO = Hello(bytes(16), False, bytes(32), 50, 2**20, 2**22, features=heads.FEATURES)
REQUEST = heads.encode_request(RequestHead("expert.forward", 5.0, 0, 0, 2**20, {"uid": "a.1"}))
PEER = Identity.from_seed(b"f" * 32).peer_id
QUOTA = Quota(calls=2, num_bytes=2**20, concurrent=2)
CONTEXTS = make_contexts(Identity.from_seed(b"f" * 32))


def mutate(pick: random.Random, data: bytes) -> bytes:
    """A few bytes changed, dropped, repeated or cut off; sometimes nothing but noise."""
    out = bytearray(data)
    for _ in range(pick.choice((0, 1, 1, 2, 5))):
        if not out:
            break
        at = pick.randrange(len(out))
        match pick.randrange(5):
            case 0:
                out[at] = pick.randrange(256)
            case 1:
                out[at] ^= 1 << pick.randrange(7)
            case 2:
                del out[at : at + pick.randrange(1, 9)]
            case 3:
                out[at:at] = pick.choice((b"\xff" * 4, b"\x00" * 8, pick.randbytes(3), bytes(out[at : at + 16])))
            case 4:
                del out[at:]
    return bytes(out) if pick.random() < 0.95 else pick.randbytes(pick.randrange(80))


def value(pick: random.Random, depth: int = 0) -> Any:
    """Something that msgpack can hold."""
    kinds: list[Callable[[], Any]] = [
        lambda: None,
        lambda: pick.choice((True, False, 0, 1, -1, 2**40, 2**63, -(2**63), 1.5, float("nan"))),
        lambda: pick.choice(("", "uid", "float32", "none", "uint8_blockwise", "s", "t", "l", "x" * 300)),
        lambda: pick.randbytes(pick.choice((0, 16, 32))),
    ]
    if depth < 4:
        kinds.append(lambda: [value(pick, depth + 1) for _ in range(pick.randrange(5))])
        kinds.append(lambda: {value(pick, 9) if pick.random() < 0.2 else "k": value(pick, depth + 1) for _ in range(3)})
    return pick.choice(kinds)()


class Holder:
    """The driver, as far as budgets know it."""

    side: ConnectionProtocol

    def room_changed(self, room: Reservation) -> None:
        self.side.room_changed(room, 0.0)


def fuzz_machine(pick: random.Random) -> None:
    """Both roles of a connection take mutated frames of every kind."""
    quotas = Quotas(Policy(quota=QUOTA))
    budgets = NodeBudgets(2**23)
    budgets.replies.total = pick.choice((2**18, 2**22))
    holder = Holder()
    side = holder.side = ConnectionProtocol(
        "peer",
        HELLO,
        dialed=pick.random() < 0.5,
        budgets=budgets,
        owner=Owner("range", PEER, holder),
        bounds=SETTINGS,
        now=0.0,
        quotas=quotas if pick.random() < 0.3 else None,
        refusal=(lambda: NotAllowed("not here")) if pick.random() < 0.1 else None,
    )
    for _ in range(2):
        head = RequestHead("m", 5.0, 0, 0, 2**20, None)
        payload = memoryview(bytes(pick.choice((5, 70_000))))
        in_parts = pick.random() < 0.5
        side.start_call(head, (payload,), deadline=5.0, reserve_reply=False, now=0.0, in_parts=in_parts)
    data = bytearray()
    if pick.random() < 0.3:  # whole calls, so that replies wait: what follows may grant, cancel, or end them
        if pick.random() < 0.5:
            data += frames.frame(frames.WINDOW, stream=2**18)
        for stream in range(1, pick.randrange(2, 8)):
            payload = frames.encode_table(len(REQUEST), []) + REQUEST
            data += frames.frame(frames.REQUEST, stream=stream, flags=pick.choice((0, frames.MORE)), payload=payload)
            if pick.random() < 0.3:
                kind, flags = pick.choice((frames.GRANT_REPLY, frames.CANCEL)), pick.choice((0, frames.MORE))
                data += frames.frame(kind, stream=stream, flags=flags)
    for _ in range(pick.randrange(1, 8)):
        stream = pick.choice((1, 2, 3, 2**63))
        kind = pick.randrange(18)
        table = frames.encode_table(pick.choice((0, len(REQUEST))), [pick.choice((0, 70_000, 2**21, 2**50))])
        if kind in (frames.CHUNK_REQUEST, frames.CHUNK_REPLY):
            length = pick.choice((1, 4096, 70_000))
            data += frames.HEADER.pack(kind, 0, 0, length, stream) + bytes(length)
            continue
        result = heads.encode_result(value(pick))
        payload = pick.choice(
            (
                b"",
                table,
                frames.encode_table(len(REQUEST), []) + REQUEST,
                frames.encode_table(len(result), [3]) + result + b"abc",
            )
        )
        data += mutate(pick, frames.frame(kind, stream=stream, flags=pick.randrange(8), payload=payload))
    view, now = memoryview(bytes(data)), 0.0
    lane = pick.choice((0, 0, 1))
    try:
        while view:
            reader = side.lanes[lane].reader
            buffer = reader.get_buffer()
            count = min(len(buffer), len(view), pick.choice((7, 60, 60, 3000, 2**20)))
            buffer[:count] = view[:count]
            view = view[count:]
            side.now = now
            side.life.received(count, now, lane)
            reader.buffer_updated(count)
            budgets.deliver()
            for event in taken(side):
                if isinstance(event, CallReceived | PartWanted) and pick.random() < 0.8:
                    buffers = (memoryview(bytes(pick.choice((5, 70_000, 200_000)))),)
                    in_parts = isinstance(event, PartWanted) or event.in_parts
                    while side.incoming.takes_part(event.stream):
                        more = in_parts and pick.random() < 0.7
                        if not side.reply(event.stream, None, buffers, now=now, more=more) or not more:
                            break
                elif isinstance(event, PartReceived) and pick.random() < 0.5:
                    side.outgoing.part_taken(event.stream)
            side.data_to_send(lane, 1)
            if pick.random() < 0.1:
                now += pick.choice((0.1, 8.0))
                side.handle_timer(now)
    except (ProtocolError, ConnectionLost):
        pass
    taken(side)
    side.connection_lost("the end")
    assert budgets.messages.used == 0 and side.num_calls == 0 and budgets.replies.used == 0 and not side.backlog
    assert quotas.num_under_way == 0


def fuzz_frames(pick: random.Random) -> None:
    payload = frames.encode_table(len(REQUEST), [3, 0]) + REQUEST + b"abc"
    heads.decode_request(frames.decode_small(memoryview(mutate(pick, payload)), frames.Arena())[0])


def fuzz_heads(pick: random.Random) -> None:
    anything = value(pick)
    if pick.random() < 0.5:
        heads.decode_request(["m", 5, 0, 0, 5, None][: pick.randrange(7)] + [anything])
    elif pick.random() < 0.5:
        heads.decode_reply(
            pick.choice(([0, anything], [1, "overloaded", "x", anything], [1, anything, "x", {}], anything))
        )
    else:
        heads.decode_request(frames.unpack(mutate(pick, REQUEST)))


def fuzz_hello(pick: random.Random) -> None:
    heads.decode_hello(memoryview(mutate(pick, heads.encode_hello(HELLO))))


KINDS: list[Any] = [
    messages.InfoRequest,
    messages.ExpertInfo,
    messages.ForwardRequest,
    messages.ForwardReply,
    messages.BackwardRequest,
    messages.BackwardReply,
    messages.TakeOverRequest,
    messages.TakeOverReply,
    messages.TenureRequest,
    messages.TenureReply,
    messages.StateRequest,
    messages.StateReply,
]


def fuzz_messages(pick: random.Random) -> None:
    kind = pick.choice(KINDS)
    body = [value(pick) for _ in range(pick.randrange(len(kind._fields) + 2))]
    messages.decode(kind, body if pick.random() < 0.9 else value(pick))


APPLY = apply_sample(backward=True)
APPLY_BODY, APPLY_BUFFERS = apply.encode_request(APPLY)
PART = apply.ApplyPart(
    np.array([0, 2]), np.ones(2, np.int64), np.ones(2, np.int64), [(1, NotAllowed("no"))], [], np.ones(4, np.float32)
)
PART_BODY, PART_BUFFERS = apply.encode_part(PART, backward=True)


def fuzz_apply(pick: random.Random) -> None:
    """Fields and buffers of a request, or of a part of its reply, are mutated or replaced."""
    is_part = pick.random() < 0.5
    body, buffers = (PART_BODY, PART_BUFFERS) if is_part else (APPLY_BODY, APPLY_BUFFERS)
    body = list(body)
    for place in pick.sample(range(len(body)), pick.choice((0, 1, 1, 2))):
        old = body[place]
        body[place] = mutate(pick, old) if isinstance(old, bytes) and pick.random() < 0.7 else value(pick)
    received = [memoryview(mutate(pick, bytes(one)) if pick.random() < 0.2 else bytes(one)) for one in buffers]
    del received[: pick.random() < 0.05]
    anything = body if pick.random() < 0.95 else value(pick)
    if is_part:
        apply.decode_part(anything, received, APPLY)
    else:
        request, _ = apply.decode_request(anything, received)
        places = np.arange(len(request.ids))
        assert 0 <= request.rows_of(places).max() < request.num_rows


def fuzz_tensors(pick: random.Random) -> None:
    dtype = pick.choice([*tensors.DTYPES, "float128", 5])
    shape = pick.choice(([2, 3], [], [0, 5], [2**39, 0, 2**39], [2**39] * 3, [-1], [1] * 15, "xx", value(pick)))
    meta = pick.choice(([dtype, shape, pick.choice((*compression.CODECS, "zip", 7))], None, value(pick)))
    size = pick.choice((0, 6, 12, 14, 24, 48, 96, 100))
    metas = [meta] if pick.random() < 0.9 else value(pick)
    tensors.unpack_tensors(metas, [memoryview(bytearray(pick.randbytes(size)))] * pick.choice((0, 1, 1, 1, 2)))


def fuzz_schema(pick: random.Random) -> None:
    schema = tensors.encode_schema(({"a": tensors.TensorSpec((3,)), "b": [tensors.TensorSpec((), torch.int64)]},))
    packed = mutate(pick, msgpack.packb(schema))
    tensors.decode_schema(frames.unpack(packed) if pick.random() < 0.7 else value(pick))


def fuzz_tls(pick: random.Random) -> None:
    dialing, accepting = CONTEXTS
    client, server = TlsMachine(dialing, server_side=False), TlsMachine(accepting, server_side=True)
    client.handshake()
    server.receive_data(memoryview(mutate(pick, client.data_to_send())))
    server.handshake()
    client.receive_data(memoryview(mutate(pick, server.data_to_send())))
    if client.handshake():
        server.receive_data(memoryview(mutate(pick, client.data_to_send())))
        if server.handshake():
            client.write(b"hello")
            server.receive_data(memoryview(mutate(pick, client.data_to_send())))
            server.read_into(memoryview(bytearray(100)))


TARGETS: dict[str, tuple[Callable[[random.Random], None], int, int]] = {
    # target: inputs in the quick and in the slow run
    "machine": (fuzz_machine, 1000, 200_000),
    "frames": (fuzz_frames, 3000, 250_000),
    "heads": (fuzz_heads, 3000, 200_000),
    "hello": (fuzz_hello, 3000, 150_000),
    "messages": (fuzz_messages, 3000, 100_000),
    "apply": (fuzz_apply, 3000, 100_000),
    "tensors": (fuzz_tensors, 3000, 100_000),
    "schema": (fuzz_schema, 3000, 100_000),
    "tls": (fuzz_tls, 50, 5_000),
}


def run(name: str, count: int, seed: str) -> None:
    target = TARGETS[name][0]
    survived = 0
    for number in range(count):
        try:
            target(random.Random(f"{seed} {name} {number}"))
            survived += 1
        except (ProtocolError, EOFError):
            pass
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed!r}, input {number}: {error!r}") from error
    assert 0 < survived, "nothing was ever accepted: the fuzzer does not get past the gate"


@pytest.mark.parametrize("name", TARGETS)
def test_only_protocol_errors_come_out(name: str) -> None:
    run(name, TARGETS[name][1], "quick")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", TARGETS)
def test_only_protocol_errors_come_out_of_a_million_inputs(name: str) -> None:
    run(name, TARGETS[name][2], "slow")


def test_the_slow_run_is_a_million_inputs() -> None:
    assert sum(slow for _, _, slow in TARGETS.values()) >= 1_000_000
