"""What nodes say about themselves: round trips, and what strangers may say."""

import asyncio
import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tesseract_async as ta
from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import ProtocolError
from tesseract_async.monitoring import status
from tesseract_async.monitoring.status import (
    MAX_EXPERTS,
    ExpertStatus,
    NodeStatus,
    StatusService,
    decode_status,
    encode_status,
    measure_line,
)

STATUS = NodeStatus(
    software="0.1.0",
    time=1.5e9,
    uptime=12.5,
    num_calls=30,
    num_rows=100,
    num_waiting_rows=4,
    busy_seconds=0.25,
    experts={"ffn.3.7": ExpertStatus(5, True, 7, 1, 0.5, 1.5, 9), "ffn.0.0": ExpertStatus(0, False)},
    name="attic",
    hardware="2 cores, 4 GiB",
    memory_bytes=2**30,
    num_parameters=12,
    sync_seconds=30,
)
TOLD = [1, True, 7, 1, 0.5, 1.5, 9]


def test_a_status_survives_the_wire() -> None:
    assert decode_status(encode_status(STATUS)) == STATUS
    assert decode_status({**encode_status(STATUS), "added later": 1}) == STATUS


def test_later_versions_may_tell_more_of_an_expert() -> None:
    body = encode_status(STATUS)
    later = decode_status({**body, "experts": {"ffn.3.7": [5, True, 7, 1, 0.5, 1.5, 9, "more"]}})
    assert later.experts["ffn.3.7"] == STATUS.experts["ffn.3.7"]


def test_of_many_experts_those_travel_that_show_how_large_the_grid_is() -> None:
    experts = {f"ffn.{row}.{column}": ExpertStatus(0, True) for row in range(64) for column in range(64)}
    told = decode_status(encode_status(dataclasses.replace(STATUS, experts=experts))).experts
    assert len(told) == MAX_EXPERTS and {"ffn.0.0", "ffn.63.63"} <= told.keys() <= experts.keys()


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(NodeStatus)])
@pytest.mark.parametrize(
    "value",
    [None, -1, "x" * 100, [], {"ffn": TOLD}, {"ffn.1": TOLD[1:]}, {3: TOLD}, {"ffn.1": {}}, float("nan"), True],
)
def test_malformed_fields_are_protocol_errors(field: str, value: Any) -> None:
    if value is True and field in ("time", "uptime", "busy_seconds"):
        return  # a bool is a number to Python, and harmless here
    value = "\n" if isinstance(value, str) and isinstance(getattr(STATUS, field), str) else value
    with pytest.raises(ProtocolError):
        decode_status({**encode_status(STATUS), field: value})


def test_no_figure_makes_a_rate_infinite_and_no_name_covers_others() -> None:
    assert decode_status(encode_status(STATUS) | {"name": "ệ\u0323\u0302 หน้า 機械"}).name
    for more in (
        {"name": "e" + 5 * "\u0301"},
        {"busy_seconds": 1e308},
        {"experts": {"ffn.1": [1, True, 1, 1, 1e308, 1.0, 1]}},
    ):
        with pytest.raises(ProtocolError):
            decode_status(encode_status(STATUS) | more)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=50, deadline=None)
@given(json_like, st.dictionaries(st.sampled_from([field.name for field in dataclasses.fields(NodeStatus)]), json_like))
def test_garbage_is_a_protocol_error(body: Any, fields: dict[str, Any]) -> None:
    for garbage in (body, {**encode_status(STATUS), **fields}):
        try:
            decode_status(garbage)
        except ProtocolError:
            pass


async def test_a_line_is_measured_as_far_as_its_other_end_helps() -> None:
    async with ta.TesseractNode() as other, ta.TesseractNode() as node:
        peer = other.peer_address
        assert await measure_line(node, peer) == (None, None), "nobody answers"
        async with StatusService(other):
            sends, receives = await measure_line(node, peer)
            assert sends is not None and receives is not None and min(sends, receives) > 1e5
            async with asyncio.timeout(30):
                while receives is not None:  # until what it helps with in a minute is used up
                    sends, receives = await measure_line(node, peer)
            assert sends is not None

        async def older(call: IncomingCall) -> Message:
            return Message(encode_status(STATUS))

        other.endpoint.handle(status.METHOD, older)
        sends, receives = await measure_line(node, peer)
        assert sends is not None and receives is None
