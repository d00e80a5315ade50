"""Choosing experts, against brute force and against chance; and what a server hosts of its run."""

import math
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.experts.authority import Authority
from tesseract_async.experts.choice import EXPIRED, Selection, choose, losers, select_experts
from tesseract_async.experts.grants import sign_grant
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.run import RunManifest, sign_run
from tesseract_async.identity import Identity, PeerID


def peer(number: int) -> PeerID:
    return PeerID(number.to_bytes(32, "big"))


hosted = st.dictionaries(st.tuples(st.integers(0, 5), st.integers(0, 5)), st.integers(0, 3))


@given(hosted, st.integers(0, 25), st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5))), st.randoms())
def test_free_ones_first_then_the_least_replicated(
    hosted: dict[tuple[int, int], int], wanted: int, without: set[tuple[int, int]], random: Random
) -> None:
    pattern = ExpertPattern.parse("ffn.[1:5].[2:6]")
    chosen = choose(pattern, wanted, hosted, Random(random.random()), without=without)
    members = [pattern.coords_at(rank) for rank in range(16)]
    allowed = [coords for coords in members if coords not in without]
    assert len(chosen) == len(set(chosen)) == min(wanted, len(allowed))
    assert set(chosen) <= set(allowed)
    # nobody who was left out has fewer replicas than somebody who was chosen
    left = [hosted.get(coords, 0) for coords in allowed if coords not in chosen]  # type: ignore[comparison-overlap]
    if left and chosen:
        assert max(hosted.get(coords, 0) for coords in chosen) <= min(left)  # type: ignore[call-overload]


def test_a_pattern_larger_than_any_memory() -> None:
    pattern = ExpertPattern.parse("ffn.[0:999999999].[0:999999999].[0:999999999]")
    taken = {(0, 0, number): 1 for number in range(1000)}
    chosen = choose(pattern, 1000, taken, Random(1))
    assert len(set(chosen)) == 1000
    assert not set(chosen) & set(taken)
    assert all(pattern.rank_of(coords) is not None for coords in chosen)


def test_two_newcomers_meet_no_more_often_than_chance() -> None:
    """Both take 8 of 64 free ones: 8 * 8 / 64 = 1 in common on average, as drawing from two urns gives."""
    pattern = ExpertPattern.parse("ffn.[0:8].[0:12]")
    taken = {(row, column): 1 for row in range(8) for column in range(8, 12)}
    rounds, wanted, free = 1000, 8, 64
    common = [
        len(set(choose(pattern, wanted, taken, Random(2 * n))) & set(choose(pattern, wanted, taken, Random(2 * n + 1))))
        for n in range(rounds)
    ]
    mean = wanted * wanted / free
    # hypergeometric
    variance = mean * (1 - wanted / free) * (free - wanted) / (free - 1)
    assert abs(sum(common) / rounds - mean) < 4 * math.sqrt(variance / rounds)


def test_every_free_one_is_as_likely() -> None:
    pattern = ExpertPattern.parse("ffn.[0:10]")
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(2000):
        counts.update(choose(pattern, 2, {(0,): 1, (4,): 2, (5,): 1, (9,): 1}, Random(seed)))
    assert set(counts) == {(1,), (2,), (3,), (6,), (7,), (8,)}
    expected = 4000 / 6
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_squared < 20.5  # 5 degrees of freedom, p = 0.001


def test_the_least_replicated_are_as_likely_among_themselves() -> None:
    pattern = ExpertPattern.parse("ffn.[0:4]")
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(1500):
        counts.update(choose(pattern, 1, {(0,): 2, (1,): 1, (2,): 1, (3,): 1}, Random(seed)))
    assert set(counts) == {(1,), (2,), (3,)}
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 13.8  # 2 degrees of freedom, p = 0.001


def test_of_two_who_reserved_the_same_exactly_one_keeps_it() -> None:
    all_of_them = [(row, column) for row in range(20) for column in range(20)]
    first, second = peer(1), peer(2)
    lost = losers(all_of_them, {second: all_of_them}, first)
    assert losers(all_of_them, {first: all_of_them}, second) == set(all_of_them) - lost
    assert 140 < len(lost) < 260  # and neither of them always
    assert losers([(0, 0)], {second: [(1, 1)]}, first) == set()


NOW = 2e9
ME = Identity.generate().peer_id
PATTERN = ExpertPattern.parse("ffn.[0:2].[0:2]")


def select(
    *patterns: str,
    num_experts: int | None = None,
    authority: Authority | None = None,
    stored: tuple[str, ...] = (),
    max_experts: int | None = None,
) -> Selection:
    return select_experts(
        ME,
        [ExpertPattern.parse(text) for text in patterns],
        num_experts=num_experts,
        run=None if authority is None else authority.run.manifest,
        authority=authority,
        stored=stored,
        max_experts=max_experts,
        now=NOW,
    )


def test_all_of_the_patterns_are_hosted_without_a_number() -> None:
    assert select("ffn.0.1", "ffn.0.[0:2]") == Selection(["ffn.0.1", "ffn.0.0"])
    with pytest.raises(ValueError, match="2 experts were asked for, but only 1 fit --max-memory"):
        select("ffn.0.[0:2]", max_experts=1)


def test_what_was_trained_here_before_is_taken_first() -> None:
    stored = ("ffn.1.1", "ffn.0.1", "ffn.7.7", "other")
    assert select(str(PATTERN), num_experts=3, stored=stored) == Selection(["ffn.0.1", "ffn.1.1"], 1, PATTERN)
    assert select(str(PATTERN), num_experts=1, stored=stored).uids == ["ffn.0.1"]
    limited = select(str(PATTERN), num_experts=3, stored=stored, max_experts=2)
    assert limited.num_more == 0 and limited.notes == ("only 2 of 3 experts fit --max-memory",)
    with pytest.raises(ValueError, match="one pattern"):
        select("ffn.0", "ffn.1", num_experts=1)


def test_an_expired_grant_hosts_what_it_hosted_and_nothing_more() -> None:
    owner = Identity.generate()
    signed = sign_run(owner, RunManifest("digits", "ffn", (1, 4), "ffn"))

    def authority(*, expired: bool = False) -> Authority:
        made = Authority(signed)
        until = int(NOW) + (-5 if expired else 1000)
        covers = ExpertPattern.parse("ffn.0.[0:3]")
        grant = sign_grant(owner, made.run_id, ME, ["host"], serial=1, not_after=until, pattern=covers)
        assert made.learn_grant(grant.blob)
        return made

    assert select("ffn.0.[0:2]", authority=authority()).uids == ["ffn.0.0", "ffn.0.1"]
    for pattern, sentence in (("ffn.0.3", "does not cover ffn.0.3"), ("ffn.0.[0:5]", "beyond"), ("x.0.0", "not part")):
        with pytest.raises(ValueError, match=sentence):
            select(pattern, authority=authority())
    for patterns in ((), ("ffn.0.[0:2]",)):
        with pytest.raises(ValueError, match="has expired: ask the run's owner to renew it"):
            select(*patterns, authority=authority(expired=True))
    left = select("ffn.0.[0:2]", authority=authority(expired=True), stored=("ffn.0.1",))
    assert left == Selection(["ffn.0.1"], notes=(EXPIRED,))
    kept = select(authority=authority(), stored=("ffn.0.1", "ffn.0.3"))
    assert kept.uids == ["ffn.0.1"], "of what the grant covers"
