import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.errors import ProtocolError, UnsupportedVersion
from tesseract_async.nat import preamble

GOOD = preamble.encode_preamble(preamble.RELAY, b"t" * 16)


@pytest.mark.parametrize("kind", preamble.KINDS)
def test_round_trip(kind: int) -> None:
    data = preamble.encode_preamble(kind, b"0123456789abcdef")
    assert len(data) == preamble.LENGTH
    assert preamble.decode_preamble(data) == (kind, b"0123456789abcdef")


def test_its_first_byte_differs_from_those_of_ordinary_connections() -> None:
    assert GOOD[0] not in (0x16, 0x01)


@pytest.mark.parametrize(
    "data",
    [b"", GOOD[:-1], GOOD + b"x", b"X" + GOOD[1:], GOOD[:5] + b"\x09" + GOOD[6:], GOOD[:7] + b"\x01" + GOOD[8:]],
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        preamble.decode_preamble(data)


def test_another_version_is_told_as_such() -> None:
    with pytest.raises(UnsupportedVersion):
        preamble.decode_preamble(GOOD[:4] + b"\x02" + GOOD[5:])


@given(st.binary(min_size=20, max_size=28))
def test_untrusted_bytes_raise_protocol_errors_only(data: bytes) -> None:
    for attempt in (data, preamble.MAGIC + data[:20]):
        try:
            preamble.decode_preamble(attempt)
        except ProtocolError:
            pass
