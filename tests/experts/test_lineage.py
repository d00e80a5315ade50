"""Records that hold, records that do not, and the one branch that everybody finds in them."""

import itertools
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.errors import InvalidRecord, ProtocolError
from tesseract_async.experts.lineage import MAX_TERMS, SKEW, Lineage
from tesseract_async.experts.terms import (
    HANDOVER_SECONDS,
    MAX_BYTES,
    Seal,
    Term,
    TermKind,
    majority,
    next_epoch,
    read_seal,
    read_term,
    read_vote,
    sign_handover,
    sign_seal,
    sign_term,
    sign_vote,
)
from tests.experts.tenure_world import CREATED, RUN, UID, FakeAuthority, appoint, identity

A, B, C, D, STRANGER = (identity(number) for number in (1, 2, 3, 4, 9))
ALL = (A, B, C, D)
NOW = CREATED + 5000.0


def genesis(who: Any = A, epoch: int = 100) -> Term:
    return sign_term(who, RUN, uid=UID, epoch=epoch, boot=bytes(8), kind=TermKind.GENESIS)


def sealed(who: Any, term: Term, *successors: Any, number: int = 1, time: int = 0, root: bytes = bytes(32)) -> Seal:
    peers = [one.peer_id for one in successors]
    time = time or term.epoch
    return sign_seal(who, RUN, term=term, number=number, version=7, root=root, size=10, time=time, successors=peers)


def follows(
    who: Any, seal: Seal, epoch: int, kind: TermKind = TermKind.TAKEOVER, voters: Any = (), **more: Any
) -> Term:
    votes = [sign_vote(v, RUN, uid=UID, epoch=epoch, candidate=who.peer_id, seal=seal.age) for v in voters]
    return sign_term(
        who, RUN, uid=UID, epoch=epoch, boot=bytes(8), kind=kind, seal=seal, votes=votes, serial=seal.serial, **more
    )


def lineage(*records: Term | Seal, authority: FakeAuthority | None = None) -> Lineage:
    found = Lineage(UID, authority or FakeAuthority({one.peer_id for one in ALL}))
    for record in records:
        found.add(record, now=NOW)
    return found


def test_records_come_back_as_they_were_signed_and_fit_the_network() -> None:
    first = genesis()
    seal = sealed(A, first, B, C, D)
    vote = sign_vote(C, RUN, uid=UID, epoch=200, candidate=B.peer_id, seal=seal.age)
    term = follows(B, seal, 200, voters=[C, D])
    handed = follows(C, seal, 201, TermKind.HANDOVER, handover=sign_handover(A, RUN, seal, C.peer_id))
    assert read_term(first.blob, RUN).digest == first.digest and read_seal(seal.blob, RUN).members == seal.members
    assert read_vote(vote.blob, RUN).candidate == B.peer_id
    assert read_term(term.blob, RUN).voters == (C.peer_id, D.peer_id) and read_term(handed.blob, RUN).seal is not None
    assert max(len(one.blob) for one in (first, seal, vote, term, handed)) <= MAX_BYTES
    for kind, blob in ((read_term, seal.blob), (read_seal, term.blob), (read_vote, seal.blob)):
        with pytest.raises(InvalidRecord):
            kind(blob, RUN)
    with pytest.raises(InvalidRecord):
        read_term(term.blob, b"s" * 16)


def test_evidence_is_needed_for_each_kind() -> None:
    seal = sealed(A, genesis(), B, C)
    pair = sealed(A, genesis(), B)
    follows(B, pair, 200)  # of two members, its own vote is enough
    follows(A, sealed(A, genesis()), 200)  # one that starts again alone
    follows(D, seal, 200, TermKind.ADOPTION)
    older = sign_vote(C, RUN, uid=UID, epoch=200, candidate=B.peer_id, seal=(100, 2))
    another = sign_vote(C, RUN, uid=UID, epoch=200, candidate=A.peer_id, seal=seal.age)
    wrong: list[dict[str, Any]] = [
        {"kind": TermKind.TAKEOVER, "votes": []},
        {"kind": TermKind.TAKEOVER, "votes": [older]},
        {"kind": TermKind.TAKEOVER, "votes": [another]},
        {"kind": TermKind.HANDOVER, "handover": sign_handover(A, RUN, seal, C.peer_id)},
        {"kind": TermKind.HANDOVER, "handover": sign_handover(D, RUN, seal, B.peer_id)},
        {"kind": TermKind.ADOPTION, "serial": 3},
        {"kind": TermKind.GENESIS},
        {"kind": TermKind.ADOPTION, "epoch": 100},
    ]
    for values in wrong:
        with pytest.raises(ValueError):
            sign_term(B, RUN, **({"uid": UID, "epoch": 200, "boot": bytes(8), "seal": seal} | values))
    with pytest.raises(ValueError, match="not a member"):
        follows(D, seal, 200, voters=[B, C])
    with pytest.raises(ValueError, match="has none"):
        follows(B, seal, 200, voters=[D])
    with pytest.raises(ValueError, match="has none"):
        follows(B, sealed(A, genesis(), B, C, D), 200, voters=[C, C])


@given(st.binary(max_size=400), st.integers(0, 2**31))
def test_damaged_records_raise_nothing_else(noise: bytes, where: int) -> None:
    seal = sealed(A, genesis(), B, C)
    for record, read in ((follows(B, seal, 200, voters=[C]), read_term), (seal, read_seal)):
        at = where % len(record.blob)
        for blob in (noise, record.blob[:at], record.blob[:at] + noise + record.blob[at + 1 :], None, 7):
            if blob != record.blob:
                with pytest.raises(ProtocolError):
                    read(blob, RUN)


def test_majorities_and_epochs() -> None:
    assert [majority(n) for n in (1, 2, 3, 4)] == [1, 1, 2, 3] and majority(2, strict=True) == 2
    assert next_epoch(100, 50.5) == 101 and next_epoch(100, 500.7) == 500


def test_rank_is_by_epoch_never_by_version_and_strangers_do_not_count() -> None:
    first = genesis()
    seal = sealed(A, first, B, C)
    second = follows(B, seal, 200, voters=[C])
    found = lineage(first, seal, second)
    assert found.best is second
    late = sign_seal(
        A, RUN, term=first, number=2**62, version=2**63 - 1, root=bytes(32), size=1, time=300, successors=[]
    )
    stranger = genesis(STRANGER, 4000)
    future = follows(C, seal, 5001 + SKEW, voters=[B])
    assert not found.add(stranger, now=NOW) and not found.add(sealed(STRANGER, stranger), now=NOW)
    assert not found.add(future, now=NOW)
    found.add(late, now=NOW)
    assert found.best is second and found.num_forks == 0


@pytest.mark.parametrize("comes_first", [True, False])
@pytest.mark.parametrize("kind", [TermKind.ADOPTION, TermKind.HANDOVER, TermKind.TAKEOVER])
def test_no_term_counts_that_goes_on_from_a_seal_which_another_made_up(kind: TermKind, comes_first: bool) -> None:
    first = genesis()
    forged = sealed(D, first, STRANGER, number=2**40, time=3990)
    assert (forged.term, forged.epoch, forged.primary) == (first.digest, first.epoch, D.peer_id)
    more = {"handover": sign_handover(D, RUN, forged, D.peer_id)} if kind is TermKind.HANDOVER else {}
    voters = [STRANGER] if kind is TermKind.TAKEOVER else []
    lie = follows(D, forged, 4000, kind, voters=voters, **more)
    child = follows(D, sealed(D, lie), 4500)
    mine = [first, seal := sealed(A, first, B, C)]
    found = lineage(*((lie, child, *mine) if comes_first else (*mine, lie, child)))
    found.set_hosts({A.peer_id: 100, B.peer_id: 100, D.peer_id: 4500})
    assert found.best is first and found.seal_of(first) is seal and found.line(first) == [first.blob, seal.blob]


def test_what_a_term_goes_on_from_is_no_more_from_the_future_than_what_is_shown_alone() -> None:
    first = genesis()
    seal, late = sealed(A, first, B), sealed(A, first, number=2, time=5001 + 2 * SKEW)
    found = lineage(first, seal)
    assert not found.add(late, now=NOW) and not found.add(follows(A, late, 300), now=NOW)
    assert found.seal_of(first) is seal, "else nobody could adopt the expert before that time"
    far = sealed(D, genesis(D, 10**9))
    for kind, epoch in itertools.product((TermKind.ADOPTION, TermKind.TAKEOVER), (10**9 + 1, 10**9 + 2)):
        assert not found.add(follows(D, far, epoch, kind), now=NOW)
    # by that Seal it withstands a Term that may be a minute ahead, and whose clock is behind takes it
    assert found.add(sealed(A, first, B, number=2, time=5000 + 2 * SKEW), now=NOW)


def test_any_order_of_the_same_records_ends_in_the_same_branch() -> None:
    first = genesis()
    seals = [sealed(A, first, B, number=1), sealed(A, first, B, C, number=2, root=b"2" * 32, time=110)]
    pair = follows(B, seals[0], 200)  # a half of a pair that did not hear of C
    second = follows(B, seals[1], 210, voters=[C])
    third = follows(C, sealed(B, second, C, root=b"3" * 32), 300, TermKind.ADOPTION)
    records = [first, *seals, pair, second, third, sealed(C, third, root=b"4" * 32)]
    bests = set()
    for order in itertools.islice(itertools.permutations(records), 0, 5040, 17):
        found = lineage(*order)
        assert found.best is not None
        bests.add(found.best.digest)
    assert bests == {third.digest}


def test_a_weak_term_gives_way_to_a_line_that_went_on() -> None:
    first = genesis()
    pair = sealed(A, first, B)
    weak = follows(B, pair, 200)
    assert lineage(first, weak).best is weak
    on = sealed(A, first, B, number=2, time=201)
    assert lineage(first, weak, on, sealed(B, weak, time=900)).best is first
    assert lineage(first, weak, sealed(A, first, B, number=2, time=200)).best is weak
    # two adopters do not refute each other
    adopted = [follows(who, pair, epoch, TermKind.ADOPTION) for who, epoch in ((C, 200), (D, 205))]
    after = [sealed(who, term, time=900) for who, term in zip((C, D), adopted, strict=True)]
    found = lineage(first, *adopted, *after)
    assert found.best is adopted[1] and found.goes_on(first, adopted[0])
    assert not found.goes_on(adopted[0], adopted[1]) and not found.goes_on(adopted[1], adopted[0])
    # what the line went on to counts for it, too
    handed = follows(C, on, 300, TermKind.HANDOVER, handover=sign_handover(A, RUN, on, C.peer_id))
    strong = lineage(first, weak, sealed(B, weak, time=900), handed, sealed(C, handed, time=400))
    assert strong.best is handed


def test_who_led_once_does_not_lead_again_by_what_it_has_from_then() -> None:
    first = genesis()
    for successors in ((), (B,)):
        last = sealed(A, first, *successors)
        signature = sign_handover(A, RUN, last, B.peer_id)
        handed = follows(B, last, 110, TermKind.HANDOVER, handover=signature)
        on = sealed(B, handed, time=900)
        again = follows(A, last, 800)
        assert again.is_weak and lineage(first, handed, on, again).best is handed
        assert lineage(first, again).best is again, "where nobody went on, it may"
        last_moment = last.time + HANDOVER_SECONDS
        follows(B, last, last_moment, TermKind.HANDOVER, handover=signature)
        with pytest.raises(ValueError, match="long ago"):
            follows(B, last, last_moment + 1, TermKind.HANDOVER, handover=signature)


def test_two_seals_of_one_number_expose_their_signer() -> None:
    first = genesis()
    fine, one, other = sealed(A, first, B), *(sealed(A, first, B, number=2, root=bytes([n]) * 32) for n in (1, 2))
    found = lineage(first, fine, one, other)
    assert found.is_exposed(first) and found.best is first
    second = follows(B, fine, 200)
    assert found.add(second, now=NOW) and found.best is second and not found.is_exposed(second)
    evidence = found.evidence(first)
    assert evidence is not None and {seal.digest for seal in evidence} == {one.digest, other.digest}


def test_between_lines_that_share_no_beginning_the_hosts_decide() -> None:
    mine, rival = genesis(A, 100), genesis(D, 4000)
    forged = follows(D, sealed(D, rival), 4500)
    found = lineage(mine, sealed(A, mine, B, C), rival, forged)
    assert found.best is forged, "nobody says whom he follows"
    found.set_hosts({A.peer_id: 100, B.peer_id: 100, D.peer_id: 4500, STRANGER.peer_id: 4500})
    assert found.best is mine, "a host's made-up line moves nobody who follows another with somebody else"


def test_the_owner_appoints() -> None:
    authority = FakeAuthority({one.peer_id for one in ALL})
    first = genesis()
    seal = sealed(A, first, B, C)
    appointed = sign_term(D, RUN, uid=UID, epoch=150, boot=bytes(8), kind=TermKind.APPOINTED, serial=1, seal=seal)
    later = follows(B, seal, 200, voters=[C])
    found = lineage(first, seal, later, authority=authority)
    assert not found.add(appointed, now=NOW)
    authority.appointed = appoint(1, D.peer_id)
    assert found.add(appointed, now=NOW) and found.best is appointed
    usurper = sign_term(C, RUN, uid=UID, epoch=300, boot=bytes(8), kind=TermKind.APPOINTED, serial=1, seal=seal)
    assert not found.add(usurper, now=NOW)


def test_revoked_signers_do_not_count_any_more_and_expired_ones_do() -> None:
    authority = FakeAuthority({one.peer_id for one in ALL})
    first = genesis()
    seal = sealed(A, first, B, C)
    second = follows(B, seal, 200, voters=[C])
    found = lineage(first, second, authority=authority)
    authority.granted.discard(B.peer_id)
    found.authority_changed()
    assert found.best is first


def test_a_hosts_flood_stays_small_and_pushes_nothing_out() -> None:
    first = genesis()
    seal = sealed(A, first, B, C)
    second = follows(B, seal, 200, voters=[C])
    found = lineage(first, second)
    found.set_hosts({A.peer_id: 200, B.peer_id: 200})
    random = Random(1)
    flood = []
    for _ in range(3 * MAX_TERMS):
        term = genesis(D, random.randrange(4000))
        flood.append(sealed(D, term))
        found.add(term, now=NOW)
        found.add(flood[-1], now=NOW)
    remembered = {term.digest for one in flood if (term := found.term_of(one)) is not None}
    assert found.best is second and len(remembered) <= 10


def test_who_names_a_term_that_was_refuted_still_follows_its_tree() -> None:
    first = genesis()
    seal = sealed(A, first, B, number=2, time=150)
    lie = follows(D, seal, 200, TermKind.ADOPTION)
    other = genesis(C, 250)
    found = lineage(first, seal, lie, other, sealed(C, other))
    found.set_hosts({A.peer_id: 200, B.peer_id: 200, C.peer_id: 250})
    assert found.best is lie
    found.add(sealed(A, first, B, number=3, time=300), now=NOW)  # it was alive
    assert found.best is first


def test_a_primary_whose_file_nobody_shows_counts_for_nothing_until_one_does() -> None:
    first, other = genesis(A, 100), genesis(B, 200)
    found = lineage(first, sealed(A, first), other, sealed(B, other))
    assert found.best is other and found.unshown is None
    found.missed(other, 0.0)
    found.missed(other, 59.0)
    assert found.best is other
    found.missed(other, 60.0)
    assert found.best is first and found.unshown is other
    found.add(again := genesis(B, 300), now=NOW)
    assert found.best is first and found.unshown is again
    found.shown(again)
    assert found.best is again and found.unshown is None
    found.missed(again, 70.0)
    found.missed(again, 200.0)
    found.missed(first, 70.0)
    found.missed(first, 200.0)
    assert found.best is again, "of those that nobody shows, as if there were no doubt"


def test_the_seal_from_which_the_line_goes_on_counts_where_its_term_is_forgotten() -> None:
    seal = sealed(A, genesis(), B)
    found = lineage(follows(B, seal, 200))
    shown = found.read(seal.blob)
    assert isinstance(shown, Seal) and found.is_sealed(shown)
    other = sealed(A, genesis(), B, root=bytes(31) + b"\1")
    assert not found.is_sealed(other)


def test_a_line_has_passed_what_it_went_on_from_and_not_what_came_after() -> None:
    first = genesis()
    seals = [sealed(A, first, B, number=number) for number in (1, 2, 3)]
    second = follows(B, seals[1], 200)
    third = follows(B, sealed(B, second, A), 300)
    found = lineage(first, second, third)
    assert [found.has_passed(seal, third) for seal in seals] == [True, True, False]
    assert found.has_passed(seals[2], first) and not found.has_passed(seals[0], genesis(C))
