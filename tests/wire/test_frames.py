"""Cutting bytes into frames, whole messages in one frame, and large ones into their own memory."""

import random
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.errors import MessageTooLarge, ProtocolError
from tesseract_async.wire import frames
from tesseract_async.wire.frames import Arena, Assembly, FrameReader


class Recorder:
    """A sink that keeps what it hears; chunks go to the assemblies that a test puts there."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []
        self.assemblies: dict[int, Assembly] = {}
        self.index = 0
        self.handlers = {kind: partial(self.frame_received, kind) for kind in range(256)}

    def frame_received(self, kind: int, index: int, flags: int, stream: int, payload: memoryview) -> None:
        self.heard.append((kind, flags, stream, bytes(payload)))

    def chunk_started(self, kind: int, stream: int, length: int) -> Assembly | None:
        return self.assemblies.get(stream)

    def chunk_finished(self, kind: int, stream: int, length: int) -> None:
        self.heard.append((kind, "chunk", stream, length))


def feed(reader: FrameReader, data: bytes, pick: random.Random) -> None:
    """Gives the bytes in pieces of random sizes, as a socket would."""
    view = memoryview(data)
    while view:
        buffer = reader.get_buffer()
        assert type(buffer) is memoryview and len(buffer) and not buffer.readonly
        count = min(len(buffer), len(view), pick.choice((1, 7, 16, 100, 5000, 100_000)))
        buffer[:count] = view[:count]
        view = view[count:]
        reader.buffer_updated(count)


def address(view: memoryview) -> int:
    import numpy as np

    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0]) if len(view) else 0


def test_frames_and_chunks_are_cut_alike_however_the_bytes_arrive() -> None:
    pick = random.Random(5)
    for _ in range(30):
        recorder, stream, expected, contents = Recorder(), bytearray(), [], {}
        for number in range(1, 6):
            payload = pick.randbytes(pick.choice((0, 1, 50, 3000, frames.MAX_SMALL)))
            stream += frames.frame(frames.REQUEST, stream=number, flags=number, payload=payload)
            expected.append((frames.REQUEST, number, number, payload))
            sizes = [pick.choice((0, 1, 63, 64, 9000, 40_000, 200_000)) for _ in range(3)]
            total = 10 + sum(sizes)
            recorder.assemblies[number] = Assembly(10, sizes)
            contents[number] = pick.randbytes(total)
            position = 0
            while position < total:
                length = min(total - position, pick.choice((1000, 60_000, 250_000)))
                stream += frames.HEADER.pack(frames.CHUNK_REQUEST, 0, 0, length, number)
                stream += contents[number][position : position + length]
                expected.append((frames.CHUNK_REQUEST, "chunk", number, length))
                position += length
        # a chunk that nobody wants is skipped
        stream += frames.HEADER.pack(frames.CHUNK_REPLY, 0, 0, 30_000, 99) + bytes(30_000)
        stream += frames.frame(frames.PING)
        feed(FrameReader(recorder), bytes(stream), pick)
        assert recorder.heard == [*expected, (frames.PING, 0, 0, b"")]
        for number, assembly in recorder.assemblies.items():
            assert assembly.left == 0
            assert b"".join((assembly.head, *assembly.buffers)) == contents[number]
            assert all(address(buffer) % 64 == 0 for buffer in assembly.buffers)


def test_a_chunk_is_received_straight_into_its_message() -> None:
    recorder = Recorder()
    recorder.assemblies[1] = assembly = Assembly(0, [1_000_000])
    reader = FrameReader(recorder)
    buffer = reader.get_buffer()
    buffer[:16] = frames.HEADER.pack(frames.CHUNK_REQUEST, 0, 0, 1_000_000, 1)
    reader.buffer_updated(16)
    buffer = reader.get_buffer()
    assert len(buffer) == 1_000_000 and address(buffer) == address(assembly.buffers[0])


@pytest.mark.parametrize(
    ("header", "error"),
    [
        ((frames.REQUEST, 0, 1, 0, 0), ProtocolError),
        ((frames.REQUEST, 0, 0, frames.MAX_SMALL + 1, 0), MessageTooLarge),
        ((frames.CHUNK_REQUEST, 0, 0, 0, 0), MessageTooLarge),
        ((frames.CHUNK_REQUEST, 0, 0, frames.MAX_CHUNK + 1, 0), MessageTooLarge),
    ],
)
def test_headers_that_break_the_rules_end_the_channel(header: tuple[int, ...], error: type[Exception]) -> None:
    reader = FrameReader(Recorder())
    reader.get_buffer()[:16] = frames.HEADER.pack(*header)
    with pytest.raises(error):
        reader.buffer_updated(16)


def test_scratch_memory_is_given_back_only_when_empty() -> None:
    recorder = Recorder()
    reader = FrameReader(recorder)
    data = frames.frame(frames.REQUEST, stream=3, payload=b"hello")
    for cut in range(1, len(data)):
        for part in (data[:cut], data[cut:]):
            reader.get_buffer()[: len(part)] = part
            reader.buffer_updated(len(part))
            reader.release_scratch()
    assert recorder.heard == [(frames.REQUEST, 0, 3, b"hello")] * (len(data) - 1)


@given(st.binary(max_size=200), st.lists(st.binary(max_size=3000), max_size=5))
def test_a_small_message_comes_back(head: bytes, parts: list[bytes]) -> None:
    packed = frames.pack([head])
    buffers = [memoryview(part) for part in parts]
    sizes = [len(part) for part in parts]
    data = frames.encode_small(frames.REPLY, 7, packed, sizes, buffers)
    assert len(data) == 16 + frames.message_bytes(len(packed), sizes)
    value, received = frames.decode_small(memoryview(data)[16:], Arena())
    assert value == [head] and [bytes(buffer) for buffer in received] == parts
    assert all(address(buffer) % 64 == 0 and not buffer.readonly for buffer in received)
    for other in (data[16:] + b"x", data[16:-1]):  # longer or shorter than its table says
        with pytest.raises(ProtocolError):
            frames.decode_small(memoryview(other), Arena())


@given(st.binary(max_size=100))
def test_small_messages_raise_only_protocol_errors(data: bytes) -> None:
    for decode in (lambda: frames.decode_small(memoryview(data), Arena()), lambda: frames.unpack(data)):
        try:
            decode()
        except ProtocolError:
            pass


def test_announced_sizes_are_checked_before_memory_is_taken() -> None:
    table = frames.encode_table(0, [1 << 40])
    with pytest.raises(ProtocolError):
        frames.decode_small(memoryview(table), Arena())
    with pytest.raises(MessageTooLarge):
        frames.decode_table(memoryview(frames.encode_table(frames.MAX_HEAD + 1, [])))
    with pytest.raises(ProtocolError):
        frames.decode_table(memoryview(bytes.fromhex("00000000ffffffff") + bytes(100)))


def test_bombs_of_nested_msgpack_are_refused() -> None:
    for bomb in (b"\x91" * 100_000, b"\x81\xa0" * 50_000, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"):
        with pytest.raises(ProtocolError):
            frames.unpack(bomb)


def test_memory_of_small_messages_does_not_overlap() -> None:
    arena = Arena()
    views = [view for size in [1, 64, 100, 4096, 0, 7000, 9000] * 20 for view in arena.allocate((size, 3), size + 3)]
    for index, view in enumerate(views):
        view[:] = bytes([index % 251]) * len(view)
    assert all(bytes(view) == bytes([index % 251]) * len(view) for index, view in enumerate(views))


def test_what_cannot_be_packed_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="too large"):
        frames.pack(bytes(frames.MAX_HEAD + 1))
    with pytest.raises(ValueError, match="integer"):
        frames.pack(1 << 70)
    with pytest.raises(TypeError):
        frames.pack(object())
    with pytest.raises((TypeError, ValueError)):
        frames.byte_view(memoryview(bytes(10))[::2])
