"""The ledger hands samples out once, and strangers cannot fill it."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tesseract_async.errors import Overloaded, ProtocolError
from tesseract_async.identity import Identity
from tesseract_async.sharing.samples import (
    GRACE_SECONDS,
    LEASE_SECONDS,
    MAX_TRAINERS_OF_PEER,
    STALL_SECONDS,
    STATE_BYTES,
    Ledger,
    Report,
    TrainerName,
)
from tesseract_async.sharing.spans import Piece

PEERS = [Identity.from_seed(bytes([n]) * 32).peer_id for n in range(1, 7)]
NAMES: list[TrainerName] = [(peer, bytes(16)) for peer in PEERS]


class Reference:
    """One epoch, sample by sample."""

    def __init__(self, num: int) -> None:
        self.state: dict[int, TrainerName | str] = dict.fromkeys(range(num), "free")

    def report(self, name: TrainerName, wanted: int, held: set[int], done: set[int], *, believes: bool) -> set[int]:
        for n in held | (done if believes else set()):
            if self.state.get(n) == "free":
                self.state[n] = name
        for n, who in self.state.items():
            if who == name and n in done:
                self.state[n] = "done"
            elif who == name and n not in held:
                self.state[n] = "free"
        granted = {n for n in [n for n, who in sorted(self.state.items()) if who == "free"][:wanted]}
        self.state |= dict.fromkeys(granted, name)
        return granted

    def forget(self, name: TrainerName) -> None:
        self.state |= {n: "free" for n, who in self.state.items() if who == name}


NUM = 20
SETS = st.sets(st.integers(0, NUM + 2), max_size=8)


def pieces(numbers: set[int], epoch: int = 0) -> list[Piece]:
    return [(epoch, n, n + 1) for n in sorted(numbers)]


def numbers(some: object) -> set[int]:
    return {n for _, start, stop in some for n in range(start, stop)}  # type: ignore[attr-defined]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6), SETS, SETS, SETS, st.integers(0, 25))))
def test_the_ledger_does_as_sample_by_sample(steps: list[tuple[int, int, set[int], set[int], set[int], int]]) -> None:
    ledger, reference, now = Ledger(free_at=0.0), Reference(NUM), 0.0  # others may have handed out some before
    ledger.report(NAMES[5], 1, Report(0, NUM, 0, (), (), ()), now)  # opens the epoch
    heard: dict[TrainerName, float] = {}
    for turn, (who, wanted, held, done, returned, seconds) in enumerate(steps):
        if all(one == "done" for one in reference.state.values()):
            break
        now += seconds
        for gone in [one for one, at in heard.items() if at < now - LEASE_SECONDS]:
            del heard[gone]
            reference.forget(gone)
        name, held = NAMES[who], held - done
        heard[name] = now
        grant = ledger.report(name, turn, Report(0, NUM, wanted, pieces(held), pieces(done), pieces(returned)), now)
        inside = set(range(NUM))
        is_over = all(one in ("done",) for one in reference.state.values())
        believes = now < LEASE_SECONDS - GRACE_SECONDS
        expected = reference.report(name, wanted, held & inside, done & inside, believes=believes)
        assert numbers(grant.pieces) == expected or is_over
        mine = {n for n, one in reference.state.items() if one == name}
        assert numbers(grant.gone) & inside == (held & inside) - mine
        is_over = all(one == "done" for one in reference.state.values())
        assert grant.first == (1 if is_over else 0)
    # another primary goes on with what is done
    again = Ledger(ledger.encode())
    if not all(one == "done" for one in reference.state.values()):
        grant = again.report(NAMES[0], 1, Report(0, NUM, NUM, (), (), ()), now)
        assert numbers(grant.pieces) == {n for n, one in reference.state.items() if one != "done"}


def test_strangers_cannot_fill_the_ledger() -> None:
    ledger = Ledger()
    for turn in range(20):
        claimed = [(0, 4 * (256 * turn + n), 4 * (256 * turn + n) + 1) for n in range(256)]
        ledger.report(NAMES[0], turn, Report(0, 10**9, 0, (), claimed, ()), 0.0)
    assert len(ledger.epochs[0].free) <= 512 + 256
    assert len(ledger.encode()) <= STATE_BYTES
    for n in range(1, MAX_TRAINERS_OF_PEER + 1):
        name = PEERS[1], n.to_bytes(16, "big")
        ledger.report(name, 1, Report(0, 10**9, 2**40, (), (), ()), 10.0)
    assert ledger.epochs[0].held[name].num == 1 << 20
    with pytest.raises(Overloaded):
        ledger.report((PEERS[1], bytes(16)), 1, Report(0, 10**9, 1, (), (), ()), 10.0)
    with pytest.raises(ValueError, match="1000000000 samples here, not 5"):
        ledger.report(NAMES[2], 1, Report(0, 5, 1, (), (), ()), 10.0)
    with pytest.raises(ValueError, match="epoch 7 does not follow epoch 0"):
        ledger.report(NAMES[2], 2, Report(7, 5, 1, (), (), ()), 10.0)


def test_a_trainer_ends_only_what_was_handed_out_to_it() -> None:
    ledger, (honest, liar) = Ledger(), NAMES[:2]
    (given,) = ledger.report(honest, 1, Report(0, 100, 10, (), (), ()), 0.0).pieces
    for turn, kind in enumerate(("done", "returned")):
        claims = Report(0, 100, 5, (), (), ())._replace(**{kind: [(0, 0, 100)]})
        grant = ledger.report(liar, turn, claims, 1.0)
        assert grant.pieces == [(0, 10, 15)]  # its own, again and again
    ledger.report(liar, 2, Report(0, 100, 0, (), (), ()), 1.0)
    grant = ledger.report(honest, 2, Report(0, 100, 100, [given], (), ()), 2.0)
    assert [given, *grant.pieces] == [(0, 0, 10), (0, 10, 100)] and not grant.gone
    ledger.report(honest, 3, Report(0, 100, 0, (), [(0, 0, 100)], ()), 3.0)
    assert ledger.report(honest, 4, Report(1, 100, 0, (), (), ()), 4.0).first == 1


def test_a_trainer_whose_loop_hangs_does_not_hold_up_the_others() -> None:
    ledger, (stuck, other), turn = Ledger(), NAMES[:2], itertools.count()
    held = list(ledger.report(stuck, next(turn), Report(0, 10, 10, (), (), ()), 0.0).pieces)
    assert not ledger.report(other, next(turn), Report(0, 10, 10, (), (), ()), 0.0).pieces
    gone: list[Piece] = []
    for second in range(1, int(STALL_SECONDS) + 1):
        wanted = 10 if gone else 0
        grant = ledger.report(stuck, next(turn), Report(0, 10, wanted, held, (), ()), float(second))
        gone += grant.gone
        assert not grant.pieces
    assert gone == held
    grant = ledger.report(stuck, next(turn), Report(0, 10, 10, (), (), ()), STALL_SECONDS + 1.0)
    assert not grant.pieces and grant.waits
    grant = ledger.report(other, next(turn), Report(0, 10, 10, (), (), ()), STALL_SECONDS + 1.0)
    assert grant.pieces == [(0, 0, 10)] and grant.again == 10
    # after that it is a trainer like any other
    ledger.report(other, next(turn), Report(0, 10, 0, (), (), [(0, 0, 10)]), STALL_SECONDS + 2.0)
    assert ledger.report(stuck, next(turn), Report(0, 10, 10, (), (), ()), STALL_SECONDS + 3.0).pieces == [(0, 0, 10)]


@pytest.mark.parametrize(("epoch", "num"), [(2**62, 5), (2**48 - 1, 5), (0, 0), (0, 2**62)])
def test_what_the_next_primary_could_not_read_is_refused(epoch: int, num: int) -> None:
    ledger = Ledger()
    claimed = [(epoch, 0, 1)] if epoch < 2**48 else []
    for some in ([], claimed):
        with pytest.raises(ValueError, match="epochs have at least one sample"):
            ledger.report(NAMES[0], 1, Report(epoch, num, 1, some, (), ()), 0.0)
    Ledger(ledger.encode())


@pytest.mark.parametrize(
    "state", [b"\xff", b"\x93", b"\x92\x00\x91\x93\x00\x05\x91\x06", b"\x92\x05\x91\x93\x00\x05\x90"]
)
def test_states_that_lie_are_refused(state: bytes) -> None:
    with pytest.raises(ProtocolError):
        Ledger(state)
