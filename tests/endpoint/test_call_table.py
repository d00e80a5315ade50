"""The table of handlers: by method, and by the uid that a body names."""

from typing import Any

import pytest

from tesseract_async.endpoint.call_table import CallHandler, CallTable
from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import ExpertNotFound, NotAllowed, UnknownMethod
from tesseract_async.identity import PeerID

PEER = PeerID(bytes(32))


def call(method: str, body: Any = None) -> IncomingCall:
    return IncomingCall(PEER, method, body, (), 0.0, 0)


async def one(call: IncomingCall) -> Message:
    return Message(1)


async def two(call: IncomingCall) -> Message:
    return Message(2)


def test_a_call_goes_to_the_handler_of_its_uid_and_method() -> None:
    table = CallTable("node", uid_methods={"expert.a": "call", "expert.b": "train"})
    table.add("status", two)
    handlers: dict[str, CallHandler] = {"expert.a": one}
    table.host("e.1", handlers)
    assert table.find(call("expert.a", ["e.1"])) is one and table.find(call("status", ["e.1"])) is two
    with pytest.raises(UnknownMethod, match=r"e\.1 at node does not answer expert\.b"):
        table.find(call("expert.b", ["e.1"]))
    handlers["expert.b"] = two
    assert table.find(call("expert.b", ["e.1"])) is two and table.actions["expert.b"] == "train"
    assert list(table.uids) == ["e.1"]


def test_what_is_not_there_is_named() -> None:
    table = CallTable("node", uid_methods={"expert.a": "call"})
    for body in (None, [], [7], ["e.1"], [["e.1"]], {"uid": "e.1"}):
        with pytest.raises(ExpertNotFound):
            table.find(call("expert.a", body))
    with pytest.raises(UnknownMethod, match="no such method at node: other"):
        table.find(call("other", ["e.1"]))


def test_taken_names_are_refused_until_they_are_free() -> None:
    table = CallTable("node", uid_methods={"expert.a": "call"})
    table.add("status", one)
    table.host("e.1", {})
    for taken in ("status", "expert.a"):
        with pytest.raises(ValueError, match="has a handler"):
            table.add(taken, two)
    with pytest.raises(ValueError, match=r"hosts e\.1 already"):
        table.host("e.1", {})
    table.remove("status")
    table.remove("expert.a")
    table.unhost("e.1")
    table.add("status", two, action="host")
    table.host("e.1", {"expert.a": two})
    assert table.actions["status"] == "host" and table.find(call("expert.a", ["e.1"])) is two


def test_callers_of_a_uid_are_checked_before_it_is_told_what_it_answers() -> None:
    def check(call: IncomingCall, uid: str) -> None:
        raise NotAllowed(f"not {uid}")

    table = CallTable("node", uid_methods={"expert.a": "call"}, check=check)
    table.host("e.1", {})
    table.add("status", one)
    with pytest.raises(NotAllowed, match=r"not e\.1"):
        table.find(call("expert.a", ["e.1"]))
    assert table.find(call("status")) is one
