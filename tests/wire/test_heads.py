"""Heads of requests and replies, errors that travel, and the hello."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.errors import (
    ExpertNotFound,
    NotPrimary,
    Overloaded,
    ProtocolError,
    RemoteError,
    UnsupportedVersion,
    describe,
)
from tesseract_async.wire import frames, heads
from tesseract_async.wire.heads import Hello, RequestHead

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


def test_a_request_head_comes_back() -> None:
    head = RequestHead("expert.forward", 1.5, -3, 100, 200, {"uid": "ffn.3.7"})
    back = heads.decode_request(frames.unpack(heads.encode_request(head)))
    assert back._replace(time_left=1.5) == head
    assert 1.5 <= back.time_left <= 1.502  # rounded up, so that it never becomes zero on the way


def test_results_and_errors_come_back() -> None:
    assert heads.decode_reply(frames.unpack(heads.encode_result([1, None]))) == ([1, None], None)
    led = NotPrimary("follows", primary=bytes(32), retry_after=1.0)
    for error in (ExpertNotFound("no ffn.3.7"), Overloaded("full", retry_after=2.5), RemoteError("oh", a=1), led):
        _, back = heads.decode_reply(frames.unpack(heads.encode_error(error)))
        assert type(back) is type(error) and str(back) == str(error) and back.details == error.details


def test_unknown_errors_and_odd_details_are_tamed() -> None:
    _, error = heads.decode_reply([1, "from the future", "sentence", {}])
    assert type(error) is RemoteError and str(error) == "sentence"
    for after in ("soon", -1, float("nan"), 1e9, True):
        _, error = heads.decode_reply([1, "overloaded", "full", {"retry_after": after}])
        assert isinstance(error, Overloaded) and error.retry_after == 0.0
    long = RemoteError("x" * 10_000, data=bytes(100_000))
    _, error = heads.decode_reply(frames.unpack(heads.encode_error(long)))
    assert error is not None and len(str(error)) == 2000 and error.details == {}
    assert heads.encode_error(RemoteError("x", data=object()))
    _, error = heads.decode_reply([1, "not_allowed", "no\x1b[2J\r\n\u202eyes, café", {}])
    assert str(error) == "no\\x1b[2J \n\\u202eyes, café", "nothing that a terminal would obey"


@given(anything)
def test_decoding_raises_only_protocol_errors(value: Any) -> None:
    for decode in (heads.decode_request, heads.decode_reply):
        for shaped in (
            value,
            [0, value],
            [1, "overloaded", "x", value],
            ["m", 1, 0, 0, 5, value],
            [value] * 6,
        ):
            try:
                decode(shaped)
            except ProtocolError:
                pass


@given(st.binary(max_size=60))
def test_hellos_raise_only_protocol_errors(data: bytes) -> None:
    for payload in (data, b"TSRA\x00\x01" + data):
        try:
            heads.decode_hello(memoryview(payload))
        except ProtocolError:
            pass


def test_hellos_tell_who_and_which_version() -> None:
    hello = Hello(bytes(16), True, bytes(range(32)), 10, 20, 30)
    payload = heads.encode_hello(hello)
    assert heads.decode_hello(memoryview(payload)) == hello
    with pytest.raises(UnsupportedVersion, match="wire version 9") as caught:
        heads.decode_hello(memoryview(b"TSRA\x00\x09" + payload[6:]))
    assert caught.value.theirs == 9 and caught.value.ours == frames.VERSION
    with pytest.raises(ProtocolError, match="does not speak"):
        heads.decode_hello(memoryview(b"HTTP/1.1 400 Bad Request"))


def test_hellos_show_few_short_grants() -> None:
    hello = Hello(bytes(16), False, bytes(32), 10, 20, 30, (b"one", b"two"))
    assert heads.decode_hello(memoryview(heads.encode_hello(hello))) == hello
    wrong: list[Any] = [(b"x",) * 5, (bytes(481),), ("text",), (None,)]
    for grants in wrong:
        with pytest.raises(ProtocolError, match="malformed hello"):
            heads.decode_hello(memoryview(heads.encode_hello(dataclasses.replace(hello, grants=grants))))


class Unreadable(RemoteError):
    def __str__(self) -> str:
        raise SystemExit("no message")


def test_every_error_becomes_an_answer() -> None:
    deep: Any = []
    for _ in range(2000):
        deep = [deep]
    odd: Any = None
    for error in (
        RemoteError("a lone \ud800", note="\udfff"),
        RemoteError("deep", deep=deep),
        RemoteError("large", number=2**70),
        RemoteError(odd),
        Unreadable("x"),
    ):
        _, back = heads.decode_reply(frames.unpack(heads.encode_error(error)))
        assert type(back) is RemoteError and str(back)


def test_a_described_error_is_one_short_line_whatever_it_does() -> None:
    for error in (Unreadable("x"), ValueError("two\nlines \ud800"), ValueError("x" * 100_000), TimeoutError()):
        line = describe(error)
        assert line.startswith(type(error).__name__) and len(line) <= 600 and "\n" not in line
        line.encode()
