"""Rounds: when they close, who counts, and what a liar can do."""

import statistics
from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.errors import Overloaded, ProtocolError
from tesseract_async.identity import PeerID
from tesseract_async.sharing.fragment import Fragment, Outer
from tesseract_async.sharing.layout import Cut, MergeKind
from tesseract_async.sharing.rounds import FIRST_INTERVAL, MAX_MEMBERS, MIN_WAIT, Push, Rounds, judge
from tesseract_async.wire import compression

CUT = Cut(MergeKind.STEPPED, 0, 40)
OUTER = Outer(codec="none")
PEERS = [PeerID(bytes([number]) * 32) for number in range(10)]


def push(peer: int, value: float | torch.Tensor = 1.0, *, steps: int = 32) -> Push:
    values = value if isinstance(value, torch.Tensor) else torch.full((40,), value)
    return judge(PEERS[peer], bytes([peer]) * 16, steps, bytes(compression.encode(values, "none")), CUT, OUTER)


def fragment(cut: Cut = CUT) -> Fragment:
    return Fragment(cut, OUTER, torch.zeros(cut.numel, dtype=cut.dtype))


def merged(rounds: Rounds, *pushes: Push, now: float = 0.0, into: Fragment | None = None) -> torch.Tensor:
    """What these come to, in a round of their own."""
    for one in pushes:
        rounds.add(one, rounds.version, now)
    return rounds.merge(rounds.close(), into or fragment())


def test_one_alone_never_waits() -> None:
    rounds = Rounds(0, max_steps=64)
    assert rounds.closes_at(0.0) is None
    for number in range(5):
        rounds.add(push(0), number, float(number))
        assert rounds.closes_at(float(number)) == number
        assert [one.peer for one in rounds.close()] == [PEERS[0]]


def test_a_round_waits_for_those_of_the_last_two_rounds() -> None:
    rounds = Rounds(0, max_steps=64)
    rounds.add(push(0), 0, 0.0)
    rounds.close()
    rounds.add(push(1), 1, 10.0)
    assert rounds.closes_at(10.0) == 10.0 + MIN_WAIT  # peer 0 pushed in the last round
    rounds.add(push(0), 1, 10.5)
    assert rounds.closes_at(10.5) == 10.5
    rounds.close()
    rounds.add(push(1), 2, 20.0)
    assert rounds.closes_at(20.0) > 20.0
    rounds.close()  # its time was over
    rounds.add(push(1), 3, 30.0)
    assert rounds.closes_at(30.0) > 30.0
    rounds.close()
    rounds.add(push(1), 4, 40.0)  # two rounds without peer 0: nobody waits for it any longer
    assert rounds.closes_at(40.0) == 40.0


def test_a_round_waits_for_newcomers_that_fetched_the_state() -> None:
    rounds = Rounds(0, max_steps=64)
    for peer in range(3):
        rounds.expect(PEERS[peer])
    rounds.add(push(0), 0, 0.0)
    rounds.add(push(1), 0, 0.5)
    assert rounds.closes_at(0.5) > 0.5  # or the first to come would move the anchor alone, and then the others again
    rounds.add(push(2), 0, 1.0)
    assert rounds.closes_at(1.0) == 1.0
    rounds.close()
    rounds.expect(PEERS[3])  # never comes
    for version in (1, 2):
        for peer in range(3):
            rounds.add(push(peer), version, 10.0 * version)
        assert rounds.closes_at(10.0 * version) > 10.0 * version
        rounds.close()
    for peer in range(3):
        rounds.add(push(peer), 3, 30.0)
    rounds.expect(PEERS[3])  # it fetches again and again
    assert rounds.closes_at(30.0) == 30.0  # nobody waits for it any longer
    rounds.add(push(3), 3, 30.0)
    rounds.close()
    rounds.expect(PEERS[3])  # now it has pushed
    rounds.add(push(0), 4, 40.0)
    assert rounds.closes_at(40.0) > 40.0


def test_a_host_that_took_over_waits_for_members_that_it_does_not_know() -> None:
    rounds = Rounds(7, max_steps=64)
    rounds.add(push(0), 7, 0.0)
    assert rounds.closes_at(0.0) == MIN_WAIT
    rounds.close()
    rounds.add(push(0), 8, 10.0)
    assert rounds.closes_at(10.0) == 10.0
    rounds = Rounds(7, max_steps=64)
    rounds.expect(PEERS[0])  # it entered here: the host was started again, and nobody else is there
    rounds.add(push(0), 7, 0.0)
    assert rounds.closes_at(0.0) == 0.0


def test_members_that_come_in_rounds_of_their_own_count_as_in_one() -> None:
    """Three that push 1, 2 and 3 come to 2 together, and so they do one by one."""
    apart = Rounds(0, max_steps=64)
    whole = merged(Rounds(0, max_steps=64), *(push(peer, peer + 1.0) for peer in range(3)))
    moved = torch.zeros(40)
    for turn in range(2):  # in the first they are not known yet
        moved = torch.zeros(40)
        for peer in range(3):
            moved += merged(apart, push(peer, peer + 1.0), now=10.0 * (3 * turn + peer))
    assert torch.allclose(whole, torch.full((40,), 2.0)) and torch.allclose(moved, whole)


def test_late_pushes_count_in_the_next_round_and_lengthen_the_wait() -> None:
    rounds = Rounds(0, max_steps=64)
    version, now = 0, 0.0
    timeouts = []
    for _ in range(12):
        rounds.add(push(0), version, now)
        if version:
            for late in (1, 2):  # their base is that of the last round: 20.5 s after it opened
                rounds.add(push(late), version - 1, now + 0.5)
        rounds.close()
        timeouts.append(rounds.timeout)
        version, now = version + 1, now + 20.0
    assert timeouts[0] == MIN_WAIT and timeouts[-1] == 20.0  # at most one interval between rounds


@given(st.lists(st.tuples(st.integers(0, 6), st.floats(0, 20)), min_size=1, max_size=60))
def test_the_timeout_is_that_of_the_offsets_seen(arrivals: list[tuple[int, float]]) -> None:
    rounds, now, version = Rounds(0, max_steps=64), 0.0, 0
    seen, last, periods = defaultdict[int, list[float]](list), dict[int, float](), dict[int, float]()
    opened, interval, members = 0.0, FIRST_INTERVAL, [frozenset[PeerID](), frozenset[PeerID]()]
    present: set[PeerID] = set()
    for peer, wait in arrivals:
        now += wait
        if PEERS[peer] in present:
            with pytest.raises(Overloaded):
                rounds.add(push(peer), version, now)
            continue
        if not present:
            interval = max(MIN_WAIT, now - opened) if version else interval
            opened = now
        rounds.add(push(peer), version, now)
        present.add(PEERS[peer])
        seen[peer].append(now - opened)
        if peer in last:
            periods[peer] = max(now - last.pop(peer), periods.get(peer, 0.0) / 2)
        last[peer] = now  # the latest comes last
        recent = [at for some in seen.values() for at in some[-8:]]
        known = [(at, periods[one]) for one, at in reversed(last.items()) if periods.get(one)]
        come = [one for at, one in known[3:] if known[0][0] - at < 4 * one]
        period = statistics.median_low([one for _, one in known[:3]] + come) if len(known) >= 3 else 0.0
        median = statistics.median(recent)
        spread = statistics.median([abs(one - median) for one in recent])
        expected = opened + min(max(2.0, median + 4 * spread), max(2.0, interval, period))
        window = 2 * (period or FIRST_INTERVAL) if len(last) >= 3 else 0.0
        lately = {PEERS[one] for one, at in last.items() if now - at < window}
        if members[0] | members[1] | lately <= present:
            expected = now
        closes_at = rounds.closes_at(now)
        assert closes_at == pytest.approx(expected)
        if closes_at is not None and closes_at <= now:
            assert {one.peer for one in rounds.close()} == present
            members, present, version = [members[1], frozenset(present)], set(), version + 1


def test_few_members_count_by_their_steps_and_claims_are_capped() -> None:
    rounds = Rounds(0, max_steps=64)
    mean = merged(rounds, push(0, 1.0, steps=30), push(1, 4.0, steps=10))
    assert torch.allclose(mean, torch.full((40,), 1.75))
    mean = merged(rounds, push(0, 1.0, steps=64), push(1, 2.0, steps=10**9))
    assert torch.allclose(mean, torch.full((40,), 1.5))
    mean = merged(rounds, push(0, 1.0, steps=0), push(1, 2.0, steps=-7))
    assert torch.allclose(mean, torch.full((40,), 1.5))
    merged(rounds, *(push(peer) for peer in range(4)))
    mean = merged(rounds, push(0, 1.0, steps=1), push(1, 2.0, steps=64))  # where four are known, claims weigh nothing
    assert torch.allclose(mean, torch.full((40,), 1.5 / 2))


@given(st.integers(4, 9), st.integers(0, 2**32 - 1), st.sampled_from([-1.0, 10.0, -1e15]))
def test_from_four_members_on_one_liar_stays_within_the_honest(num: int, seed: int, factor: float) -> None:
    random = torch.Generator().manual_seed(seed)
    honest = [torch.randn(40, generator=random) for _ in range(num - 1)]
    pushes = [push(at, values) for at, values in enumerate(honest)] + [push(9, honest[0] * factor)]
    mean = merged(Rounds(0, max_steps=64), *pushes)
    capped = torch.stack(honest)
    assert (mean <= capped.amax(0) + 1e-6).all() and (mean >= capped.amin(0) - 1e-6).all()


def test_a_difference_counts_with_three_times_the_median_norm_at_most() -> None:
    mean = merged(Rounds(0, max_steps=64), push(0, 1.0), push(1, 1.0), push(2, 1000.0))
    assert torch.allclose(mean, torch.full((40,), (1 + 1 + 3) / 3))


def test_one_alone_goes_no_farther_than_the_last_updates_did() -> None:
    """A liar is the first to come after a takeover: the new host has no member to compare it with."""
    known = fragment()
    for size in (1.0, 2.0, *[1.0] * 6):
        known.step(torch.full((40,), size))
    most = 3 * known.largest_update()
    rounds = Rounds(known.version, max_steps=64)
    assert float(merged(rounds, push(4, -1e6), into=known).norm()) == pytest.approx(most, rel=1e-5)
    assert torch.allclose(merged(rounds, push(4, 0.0), into=known), torch.zeros(40))


def test_a_liar_that_comes_often_counts_no_more_than_one_that_comes_with_the_others() -> None:
    """Seven push once in ten seconds, each when it is due; the eighth every two seconds, negated, and times ten."""
    rounds, known, moved, liars = Rounds(0, max_steps=64), fragment(), torch.zeros(40), 0.0
    for second in range(400):
        peers = [peer for peer in range(7) if second % 10 == peer]
        if second % 2 == 0:
            peers.append(9)
        for peer in peers:
            step = merged(rounds, push(peer, -10.0 if peer == 9 else 1.0), now=float(second), into=known)
            if second >= 100:  # by then the members are known
                moved += step
                liars += float(step[0]) if peer == 9 else 0.0
    # of an honest eighth in each period it may be three times as much
    assert liars == pytest.approx(30 * -3 / 8, rel=0.05)
    assert moved[0] == pytest.approx(30 * 7 / 8 + liars, rel=0.05)


def test_a_liar_that_comes_often_does_not_shorten_the_rounds() -> None:
    """Seven push every ten seconds, the eighth as soon as it may, negated, and times ten: all rounds hold all."""
    rounds, known, moved, num = Rounds(0, max_steps=64), fragment(), torch.zeros(40), 0
    at, present = {peer: 10.0 + peer / 4 for peer in range(7)} | {9: 0.5}, set[int]()
    bases = dict.fromkeys(at, 0)
    for tick in range(1600):
        now = tick / 4
        for peer in [peer for peer, due in at.items() if due <= now and peer not in present]:
            rounds.add(push(peer, -10.0 if peer == 9 else 1.0), bases[peer], now)
            present.add(peer)
        closes_at = rounds.closes_at(now)
        if closes_at is not None and closes_at <= now:
            pushes = rounds.close()
            step = rounds.merge(pushes, known)
            bases |= dict.fromkeys(present, rounds.version)
            at |= {peer: now + (1.0 if peer == 9 else at[peer] + 10.0 - now) for peer in present}
            if now >= 100.0:
                assert len(pushes) == 8
                moved, num = moved + step, num + 1
            present = set()
    assert torch.allclose(moved, torch.full((40,), float(num))) and num >= 29


def test_members_that_are_long_gone_do_not_say_how_often_the_others_come() -> None:
    """Seven came every ten minutes, and come no more; of three that push every ten seconds one leaves, too."""
    rounds, known, now = Rounds(0, max_steps=64), fragment(), 0.0
    for _ in range(3):
        now += 600.0
        merged(rounds, *map(push, range(3, 10)), now=now, into=known)
    now += 3600.0
    for _ in range(8):
        now += 10.0
        merged(rounds, *map(push, range(3)), now=now, into=known)
    closing = []
    for _ in range(10):
        now += 10.0
        for peer in range(2):
            rounds.add(push(peer), rounds.version, now)
        closing.append(rounds.closes_at(now) == now)
        rounds.close()
    assert closing == [False] * 2 + [True] * 8, "it is waited for in two rounds, not for twenty minutes"


def test_a_flush_does_not_shorten_the_next_steps() -> None:
    """All push at once after a single step; the one that comes first after that has 32 again."""
    rounds, known = Rounds(0, max_steps=64), fragment()
    for turn in range(4):
        merged(rounds, *(push(peer, 1.0) for peer in range(4)), now=10.0 * turn, into=known)
    merged(rounds, *(push(peer, 0.03, steps=1) for peer in range(4)), now=36.0, into=known)
    assert torch.allclose(merged(rounds, push(0, 1.0), now=40.0, into=known), torch.full((40,), 0.25))


def test_integers_are_those_of_the_most_advanced() -> None:
    cut = Cut(MergeKind.NEWEST, 0, 1)
    pushes = [
        judge(PEERS[at], bytes(16), steps, bytes(compression.encode(torch.tensor([at]), "none")), cut, OUTER)
        for at, steps in enumerate((5, 30, 7))
    ]
    assert merged(Rounds(0, max_steps=64), *pushes, into=fragment(cut)).tolist() == [1]
    liar = judge(PEERS[3], bytes(16), 10**6, bytes(compression.encode(torch.tensor([-(2**62)]), "none")), cut, OUTER)
    rounds = Rounds(0, max_steps=64)
    assert merged(rounds, *pushes, liar, into=fragment(cut)).tolist() == [1]  # from four on, the median
    assert merged(rounds, liar, into=fragment(cut)).tolist() == [0]  # also where it comes alone
    assert merged(rounds, *pushes, into=fragment(cut)).tolist() == [1]


def test_frozen_parameters_are_not_pushed() -> None:
    data = bytes(compression.encode(torch.ones(4), "none"))
    with pytest.raises(ValueError, match="frozen"):
        judge(PEERS[0], bytes(16), 1, data, Cut(MergeKind.FIXED, 0, 4), OUTER)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38, 1e20])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    values = torch.zeros(40)
    values[3] = bad  # a single one, whose norm may be finite
    with pytest.raises(ValueError, match="not finite, or far too large"):
        push(0, values)


def test_what_does_not_fit_is_refused() -> None:
    for data in (b"", bytes(4 * 39), bytes(4 * 41)):
        with pytest.raises(ProtocolError):
            judge(PEERS[0], bytes(16), 1, data, CUT, OUTER)


def test_a_round_holds_a_bounded_number_of_members() -> None:
    rounds, data = Rounds(0, max_steps=64), bytes(compression.encode(torch.ones(40), "none"))

    def push_of(number: int) -> Push:
        return judge(PeerID(number.to_bytes(32, "big")), number.to_bytes(16, "big"), 32, data, CUT, OUTER)

    for number in range(MAX_MEMBERS):
        rounds.add(push_of(number), 0, 0.0)
    with pytest.raises(Overloaded, match="as many members"):
        rounds.add(push_of(MAX_MEMBERS), 0, 0.0)
    assert len(rounds.close()) == MAX_MEMBERS
    rounds.add(push_of(MAX_MEMBERS), 1, 1.0)
