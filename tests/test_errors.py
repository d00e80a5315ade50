"""Sentences: what happened, to whom, and what to do, in a few hundred characters whatever happened."""

import copy
import errno
import pickle
from typing import Any

import pytest

from tesseract_async.errors import (
    ConnectionLost,
    ExpertFailed,
    NotEnoughExperts,
    Overloaded,
    PeerUnreachable,
    SchemaMismatch,
    describe,
    sentence_of,
    summarize,
)

MANY: dict[str, BaseException] = {
    f"ffn.{i}.{i}": TimeoutError(f"ffn.{i}.{i} did not answer in time") for i in range(30)
}
LONG = "a very long story\n" * 100


@pytest.mark.parametrize(
    "error",
    [
        NotEnoughExperts(2, 40, MANY | {"ffn.99": ExpertFailed(LONG), "ffn.98": ConnectionLost("p" * 500, LONG)}),
        NotEnoughExperts(1, 0, MANY),
        NotEnoughExperts(1, 7, {f"{'x' * 250}.{i}": RuntimeError(LONG) for i in range(3)}),
        NotEnoughExperts(
            1, 7, {"f.1": PeerUnreachable("peer", {f"tcp 10.0.0.1:{i}": OSError(LONG) for i in range(9)})}
        ),
        PeerUnreachable("peer", {f"tcp 10.0.0.1:{i}": type(f"Odd{i}", (Exception,), {})(LONG) for i in range(9)}),
    ],
    ids=str,
)
def test_errors_that_hold_errors_are_short(error: Exception) -> None:
    assert len(str(error)) <= 420 and "\n" not in str(error)
    assert len(describe(error)) <= 240


def test_the_cause_is_named_before_silence() -> None:
    said = summarize(MANY | {"ffn.7.1": SchemaMismatch("takes 32"), "ffn.7.2": Overloaded("full")})
    assert said.startswith(
        "ffn.7.1: SchemaMismatch: takes 32; ffn.7.2: Overloaded: full; ffn.0.0, ffn.1.1 and 28 more: T"
    )
    assert summarize({}) == ""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NotEnoughExperts(1, 5, {}), "no expert is alive: start a server"),
        (
            NotEnoughExperts(2, 1, {}, num_live=1),
            "1 row has fewer than k_min=2 answers: no expert failed, but 1 is alive",
        ),
        (NotEnoughExperts(1, 0, {"f.0": TimeoutError()}), "no expert could be asked what it takes: f.0: TimeoutError"),
        (NotEnoughExperts(2, 3, MANY, what="gradients"), "3 rows have fewer than backward_k_min=2 gradients: ffn.0.0"),
    ],
)
def test_too_few_experts_is_said_truly(error: NotEnoughExperts, said: str) -> None:
    assert str(error).startswith(said)
    assert str(copy.copy(error)) == str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(30, "Read-only file system", "/srv/node.pem"), "/srv/node.pem: Read-only file system"),
        # as asyncio says it, and uvloop
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 9)"), "Connection refused"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "Connection refused"),
        (OSError(98, "the dashboard cannot listen on ::1 port 1"), "the dashboard cannot listen on ::1 port 1"),
        (
            ExceptionGroup("many", [ExceptionGroup("inside", [PeerUnreachable("ab", {})])]),
            str(PeerUnreachable("ab", {})),
        ),
        (TimeoutError(), "TimeoutError"),
    ],
    ids=str,
)
def test_people_are_told_no_numbers_and_no_classes(error: Exception, said: str) -> None:
    assert sentence_of(error) == said
    assert "Errno" not in str(PeerUnreachable("ab", {"tcp 127.0.0.1:9": error}))


def test_whatever_a_systems_error_holds_it_is_told_in_utf_8() -> None:
    odd: list[Any] = [("x", ""), (2**40, ""), (5, object()), (2, "no such file", "/srv/\udcff"), (2, "", None)]
    for error in [OSError(*one) for one in odd]:
        assert all(said.encode() for said in (describe(error), sentence_of(error)))
