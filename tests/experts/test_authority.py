"""Who may do what in a run: what its owner says holds, whatever strangers, invites and delegates gone bad add to it."""

from random import Random
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.errors import InvalidRecord, ProtocolError
from tesseract_async.experts.authority import MAX_GRANTS, Authority
from tesseract_async.experts.grants import (
    APPOINTMENTS,
    GRANT_SECONDS,
    GRANTS,
    MAX_RECORD_BYTES,
    MAX_SERIAL,
    REVOCATIONS,
    Grant,
    Role,
    sign_appointment,
    sign_grant,
    sign_revocations,
)
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.run import RUNS, RunManifest, SignedRun, sign_run
from tesseract_async.experts.terms import EPOCH_ZERO
from tesseract_async.identity import Identity, PeerID
from tesseract_async.wire.heads import MAX_GRANT_BYTES
from tests.experts.raw_records import sign_body

NOW = 1_800_000_000
OWNER, DELEGATE, OTHER, INVITE, STRANGER, MEMBER, PEER = (Identity.from_seed(bytes([n]) * 32) for n in range(1, 8))
ALL: tuple[Role, ...] = ("host", "train", "share")
PATTERN = ExpertPattern.parse("ffn.[0:4].[0:8]")


def make_run(owner: Identity = OWNER, **values: Any) -> SignedRun:
    fields: dict[str, Any] = {"name": "digits", "prefix": "ffn", "grid_size": (8, 8), "expert": "ffn", "created": 7}
    return sign_run(owner, RunManifest(**fields | values))


RUN_ID = Authority(make_run()).run_id


def grant(
    signer: Identity,
    who: Identity,
    *roles: Role,
    serial: int = NOW,
    not_after: int = NOW + GRANT_SECONDS,
    run_id: bytes = RUN_ID,
    pattern: ExpertPattern | None = None,
    via: Grant | None = None,
) -> Grant:
    return sign_grant(
        *(signer, run_id, who.peer_id, roles or ALL), serial=serial, not_after=not_after, pattern=pattern, via=via
    )


POWER = grant(OWNER, DELEGATE, *ALL, "admit")
INVITATION = grant(OWNER, INVITE, "host", "train", "admit")


def authority(**values: Any) -> Authority:
    return Authority(make_run(delegates=[POWER.blob], **values))


def revoke(signer: Identity, *peers: Identity, since: int = NOW + 10, number: int = 0, **lists: Any) -> list[bytes]:
    parts = sign_revocations(signer, RUN_ID, number=number, since=since, peers=[one.peer_id for one in peers], **lists)
    return [b"r" + part.blob for part in parts]


def may(view: Authority, who: Identity, role: Role = "host", uid: str | None = "ffn.3.7") -> bool:
    return view.may(who.peer_id, role, uid, now=NOW)


def test_only_who_has_a_grant_may_and_only_what_it_says() -> None:
    view = authority()
    assert not may(view, MEMBER) and may(view, OWNER), "the owner needs none"
    assert view.learn_grant(grant(OWNER, MEMBER, "host", pattern=PATTERN).blob, MEMBER.peer_id)
    assert may(view, MEMBER) and may(view, MEMBER, uid=None)
    assert not may(view, MEMBER, uid="ffn.4.7") and not may(view, MEMBER, uid="attention.3.7")
    assert not may(view, MEMBER, "train") and not may(view, MEMBER, "admit")
    assert view.is_member(MEMBER.peer_id) and not view.is_member(STRANGER.peer_id)


def test_a_grant_is_of_one_peer_one_run_and_one_owner() -> None:
    view = authority()
    others = [
        grant(STRANGER, STRANGER),  # by nobody
        grant(OWNER, STRANGER, run_id=Authority(make_run(name="letters")).run_id),
        grant(OWNER, STRANGER, run_id=Authority(make_run(mode="open")).run_id),
        grant(OWNER, STRANGER, run_id=Authority(make_run(prefix="attention")).run_id),
        grant(OWNER, STRANGER, run_id=Authority(make_run(STRANGER)).run_id),
    ]
    assert len({one.run_id for one in others}) == 5
    assert not any(view.learn_grant(one.blob, STRANGER.peer_id) for one in others)
    assert not view.learn_grant(grant(OWNER, MEMBER).blob, STRANGER.peer_id), "somebody else's"
    assert not may(view, STRANGER)


def test_an_expired_grant_is_good_for_what_goes_on_and_for_nothing_new() -> None:
    view = authority()
    view.learn_grant(grant(OWNER, MEMBER, not_after=NOW).blob)
    assert not view.may(MEMBER.peer_id, "host", "ffn.3.7", now=NOW)
    assert view.may(MEMBER.peer_id, "host", "ffn.3.7", now=NOW - 1)
    assert view.may(MEMBER.peer_id, "host", "ffn.3.7", now=None)


def test_a_grant_is_renewed_and_an_older_one_shown_again_changes_nothing() -> None:
    view, first = authority(), grant(OWNER, MEMBER, "host", serial=5, not_after=NOW - 5)
    second = grant(OWNER, MEMBER, "host", serial=view.next_serial(MEMBER.peer_id, 6))
    assert view.learn_grant(first.blob) and view.learn_grant(second.blob) and view.learn_grant(first.blob)
    assert view.grant_of(MEMBER.peer_id) == second and may(view, MEMBER)


def test_a_delegate_grants_beside_the_owner_and_not_beyond_what_it_has() -> None:
    view = authority()
    assert may(view, DELEGATE), "its own grant stands in the manifest"
    assert view.learn_grant(grant(DELEGATE, MEMBER, via=POWER).blob) and may(view, MEMBER)
    narrow = grant(OWNER, DELEGATE, "host", "admit", pattern=PATTERN, not_after=NOW + 50)
    attempts: list[tuple[tuple[Role, ...], dict[str, Any]]] = [
        (("train",), {"pattern": PATTERN, "not_after": NOW + 5}),
        (("host", "admit"), {"pattern": PATTERN, "not_after": NOW + 5}),
        (("host",), {"not_after": NOW + 5}),
        (("host",), {"pattern": ExpertPattern.parse("ffn.[0:4].[0:9]"), "not_after": NOW + 5}),
        (("host",), {"pattern": ExpertPattern.parse("ffn.3"), "not_after": NOW + 5}),
        (("host",), {"pattern": ExpertPattern.parse("att.3.7"), "not_after": NOW + 5}),
        (("host",), {"pattern": PATTERN, "not_after": NOW + 51}),
        (("host",), {"pattern": PATTERN, "not_after": NOW + 5, "run_id": bytes(16)}),
    ]
    for roles, values in attempts:
        with pytest.raises(ValueError, match="more than its signer"):
            grant(DELEGATE, STRANGER, *roles, via=narrow, **values)
    fits = grant(DELEGATE, STRANGER, "host", pattern=ExpertPattern.parse("ffn.3.[2:8]"), not_after=NOW + 50, via=narrow)
    assert view.learn_grant(fits.blob)


def test_nobody_grants_by_a_grant_that_is_not_theirs_or_does_not_let_them() -> None:
    plain = grant(OWNER, MEMBER)
    invited = grant(INVITE, MEMBER, "host", via=INVITATION)
    for signer, via in ((MEMBER, plain), (STRANGER, INVITATION), (MEMBER, invited)):
        with pytest.raises(ValueError, match="may not grant|at most 480"):  # three in a row are too long as well
            grant(signer, STRANGER, "host", via=via)


def test_a_leaked_invite_admits_many_until_it_is_revoked() -> None:
    view = authority()
    many = [Identity.from_seed(n.to_bytes(32, "big")) for n in range(1000, 1020)]
    assert all(view.learn_grant(grant(INVITE, one, "host", via=INVITATION).blob) for one in many)
    direct = grant(OWNER, many[0], "host")
    assert view.learn_grant(direct.blob)
    assert view.learn(revoke(OWNER, invites=[INVITE.peer_id])[0])
    assert [may(view, one) for one in many] == [True] + [False] * 19, "who has the owner's own word stays"
    assert not view.learn_grant(grant(INVITE, STRANGER, "host", serial=MAX_SERIAL - 1, via=INVITATION).blob)


def test_a_revoked_peer_does_not_come_back_by_the_invite_that_it_has() -> None:
    for serial in (NOW, NOW + 20, MAX_SERIAL - 1):
        view = authority()
        own = grant(INVITE, MEMBER, "host", serial=serial, via=INVITATION)
        assert view.learn_grant(own.blob)
        since = view.next_serial(MEMBER.peer_id, NOW + 10)
        assert view.learn(revoke(OWNER, MEMBER, since=since)[0]) and not may(view, MEMBER)
        again = grant(INVITE, MEMBER, "host", serial=MAX_SERIAL - 1, via=INVITATION)
        assert not view.learn_grant(again.blob) and not may(view, MEMBER)
        unseen = authority()  # the member that revokes need not have seen the grant
        assert unseen.learn(revoke(OWNER, MEMBER)[0]) and not unseen.learn_grant(again.blob)
        if since < MAX_SERIAL:
            assert view.learn_grant(grant(OWNER, MEMBER, serial=since).blob) and may(view, MEMBER)


def test_an_invite_does_not_outdo_the_owner() -> None:
    view = authority()
    assert view.learn_grant(grant(INVITE, MEMBER, "host", serial=MAX_SERIAL - 1, via=INVITATION).blob)
    assert view.learn_grant(grant(OWNER, MEMBER, "train").blob)
    assert may(view, MEMBER, "train") and not may(view, MEMBER, "host")


def test_a_revoked_peer_is_out_until_it_is_granted_anew() -> None:
    view, old = authority(), grant(OWNER, MEMBER)
    view.learn_grant(old.blob)
    (record,) = revoke(OWNER, MEMBER)
    assert view.learn(record) and not view.learn(record), "told once"
    assert not may(view, MEMBER) and not view.may(MEMBER.peer_id, "host", None, now=None)
    assert view.is_revoked(MEMBER.peer_id)
    assert not view.learn_grant(old.blob, MEMBER.peer_id), "what it had before is void"
    assert not view.learn(revoke(OWNER, MEMBER, since=1, number=1)[0]) or not may(view, MEMBER), "an older one"
    assert view.learn_grant(grant(OWNER, MEMBER, serial=view.next_serial(MEMBER.peer_id, NOW)).blob)
    assert may(view, MEMBER)


def test_an_open_run_is_open_to_all_who_are_not_revoked() -> None:
    run = make_run(mode="open")
    view = Authority(run)
    assert may(view, STRANGER) and may(view, STRANGER, "train") and not may(view, STRANGER, "admit")
    parts = sign_revocations(OWNER, view.run_id, number=0, since=NOW, peers=[STRANGER.peer_id])
    view.learn(b"r" + parts[0].blob)
    assert not may(view, STRANGER) and may(view, MEMBER)


def test_delegates_revoke_members_but_neither_the_owner_nor_each_other() -> None:
    second = grant(OWNER, OTHER, *ALL, "admit")
    view = Authority(make_run(delegates=[POWER.blob, second.blob]))
    view.learn_grant(grant(OWNER, MEMBER).blob)
    view.learn(revoke(DELEGATE, MEMBER, OTHER, OWNER, invites=[OTHER.peer_id])[0])
    assert not may(view, MEMBER) and may(view, OTHER) and may(view, OWNER)
    view.learn(revoke(OWNER, DELEGATE)[0])
    assert not may(view, DELEGATE) and DELEGATE.peer_id not in view.delegates
    assert view.learn_grant(grant(OWNER, MEMBER).blob), "what it revoked counts no longer"
    with pytest.raises(InvalidRecord, match="without authority"):
        view.learn(revoke(DELEGATE, MEMBER, number=5)[0])
    assert not view.learn_grant(grant(DELEGATE, PEER, via=POWER).blob)


def test_a_newer_manifest_holds_and_an_older_one_shown_again_changes_nothing() -> None:
    view = authority()
    newer = make_run(created=8, lease=5)
    assert view.learn(b"m" + newer.blob) and view.delegates == {} and view.lease == 5
    assert not view.learn(b"m" + authority().run.blob) and view.run == newer
    for other in (
        make_run(created=9, name="letters"),
        make_run(created=9, mode="open"),
        make_run(created=9, prefix="x"),
    ):
        assert not view.learn(b"m" + other.blob)
    with pytest.raises(InvalidRecord):
        view.learn(b"m" + make_run(STRANGER, created=9).blob)


def test_the_latest_appointment_by_somebody_who_may_appoint_holds() -> None:
    narrow = grant(OWNER, DELEGATE, *ALL, "admit", pattern=PATTERN)
    view = Authority(make_run(delegates=[narrow.blob]))
    everything = ExpertPattern.parse("ffn.[0:8].[0:8]")
    first = sign_appointment(OWNER, RUN_ID, everything, serial=1, peer=MEMBER.peer_id, root=bytes(32))
    by_delegate = sign_appointment(DELEGATE, RUN_ID, PATTERN, serial=2, peer=PEER.peer_id)
    beyond = sign_appointment(DELEGATE, RUN_ID, everything, serial=3, peer=STRANGER.peer_id)
    for one in (by_delegate, beyond, first):
        assert view.learn(b"a" + one.blob) and not view.learn(b"a" + one.blob)
    assert view.appointment("ffn.3.7") == by_delegate
    assert view.appointment("ffn.5.5") == first and view.appointment("att.5.5") is None
    freed = sign_appointment(OWNER, RUN_ID, everything, serial=4, peer=None)
    assert view.learn(b"a" + freed.blob) and not view.learn(b"a" + first.blob)
    assert view.appointment("ffn.3.7") == freed
    with pytest.raises(InvalidRecord, match="another run"):
        view.learn(b"a" + sign_appointment(OWNER, bytes(16), PATTERN, serial=9, peer=None).blob)
    with pytest.raises(InvalidRecord, match="without authority"):
        view.learn(b"a" + sign_appointment(STRANGER, RUN_ID, PATTERN, serial=9, peer=None).blob)


def history() -> list[bytes]:
    """All that was ever said of one run, by everybody."""
    third = make_run(created=9, delegates=[POWER.blob])
    appointments = [sign_appointment(OWNER, RUN_ID, PATTERN, serial=n, peer=MEMBER.peer_id) for n in (1, 2)]
    return [
        *(b"m" + run.blob for run in (make_run(), make_run(created=8), third)),
        *revoke(OWNER, MEMBER, since=NOW + 1),
        *revoke(OWNER, PEER, since=NOW + 5, number=1),
        *revoke(DELEGATE, OTHER, since=NOW + 5),
        *revoke(STRANGER, OTHER),
        *(b"g" + grant(OWNER, MEMBER, serial=serial).blob for serial in (NOW, NOW + 2)),
        *(b"g" + grant(OWNER, who).blob for who in (PEER, OTHER)),
        b"g" + grant(DELEGATE, INVITE, via=POWER).blob,
        *(b"a" + one.blob for one in appointments),
    ]


def tell(view: Authority, records: list[bytes]) -> tuple[Any, ...]:
    for record in records:
        try:
            view.learn(record)
        except ProtocolError:
            continue
    return view.run, view.grants(), sorted(view.records()), view.appointment("ffn.3.7")


@given(st.randoms(use_true_random=False), st.integers(0, 14))
def test_history_in_any_order_and_in_any_part_again_ends_the_same(random: Random, count: int) -> None:
    records = history()
    settled = Authority(make_run())
    # twice: what a delegate signed is refused while nobody knows that it is one
    tell(settled, records + records)
    expected = {peer.peer_id: may(settled, peer) for peer in (MEMBER, PEER, OTHER, INVITE, DELEGATE, STRANGER)}
    assert list(expected.values()) == [True, False, False, True, True, False]
    shuffled = random.sample(records, len(records))
    view = Authority(make_run())
    tell(view, shuffled + shuffled + random.sample(records, count))
    assert {peer: view.may(peer, "host", None, now=NOW) for peer in expected} == expected
    assert sorted(view.records()) == sorted(settled.records()) and view.run == settled.run
    again = Authority.from_kept(view.kept(MEMBER.peer_id))
    assert sorted(again.records()) == sorted(view.records()) and may(again, MEMBER) and not may(again, PEER)


def test_what_is_kept_must_begin_with_the_manifest() -> None:
    for records in ([], [None], [b"x"], [*authority().records()]):
        with pytest.raises(ProtocolError):
            Authority.from_kept(records)
    assert Authority.from_kept([*authority().kept(MEMBER.peer_id), None, b"", b"r", b"garbage"]).run == authority().run


def test_invited_grants_are_forgotten_before_the_owners() -> None:
    assert MAX_GRANTS >= 10_000
    view = Authority(make_run(), max_grants=5)
    view.learn_grant(grant(OWNER, MEMBER).blob)
    many = [Identity.from_seed(n.to_bytes(32, "big")) for n in range(1000, 1020)]
    for one in many:
        view.learn_grant(grant(INVITE, one, "host", via=INVITATION).blob)
    assert len(view.grants()) == 5 and may(view, MEMBER) and may(view, many[-1])


def test_records_have_their_sizes() -> None:
    assert len(grant(OWNER, MEMBER).blob) <= 170
    longest = ExpertPattern.parse(f"{'f' * 37}.[100:200].[1000:2000]")
    chain = grant(OWNER, INVITE, *ALL, "admit", pattern=longest)
    assert len(grant(INVITE, MEMBER, *ALL, pattern=longest, via=chain).blob) <= MAX_GRANT_BYTES
    parts = sign_revocations(
        *(OWNER, RUN_ID), number=0, since=MAX_SERIAL - 1, peers=[PeerID(bytes([n]) * 32) for n in range(50)]
    )
    assert [len(part.peers) for part in parts] == [20, 20, 10] and [part.number for part in parts] == [0, 1, 2]
    assert all(len(part.blob) < MAX_RECORD_BYTES for part in parts)
    assert len(sign_appointment(OWNER, RUN_ID, PATTERN, serial=NOW, peer=MEMBER.peer_id, root=bytes(32)).blob) <= 220


def test_epochs_only_grow_and_fit_four_bytes_for_a_long_time() -> None:
    view = authority()
    assert view.epoch(NOW) == NOW - EPOCH_ZERO and view.epoch(0) == 0
    assert view.epoch(NOW + 100 * 365 * 86400) < 2**32


junk = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(max_size=40)
fields = st.lists(junk | st.lists(junk, max_size=3) | st.sampled_from([RUN_ID, bytes(32), "ffn.3.7", 3]), max_size=8)


@given(fields | junk)
def test_whatever_the_owner_of_another_run_signs_raises_protocol_error_only(body: Any) -> None:
    kinds = (
        (GRANTS.domain, GRANTS.read),
        (b"tesseract revocations 1\0", REVOCATIONS.read),
        (b"tesseract appointment 1\0", APPOINTMENTS.read),
        (RUNS.domain, RUNS.read),
    )
    for domain, decode in kinds:
        try:
            decode(sign_body(STRANGER, domain, body).blob)
        except ProtocolError:
            continue


@given(st.none() | st.integers() | st.binary(max_size=200))
def test_records_of_nobody_raise_protocol_error_only(record: Any) -> None:
    view = authority()
    with pytest.raises(ProtocolError):
        if view.learn(record) is False:
            raise ProtocolError("a grant that does not hold")
    assert not view.learn_grant(record)


def test_one_meaning_has_one_form() -> None:
    good = grant(OWNER, MEMBER, pattern=ExpertPattern.parse("ffn.3.7"))
    body = list(msgpack.unpackb(good.blob[96:]))
    assert GRANTS.read(sign_body(OWNER, GRANTS.domain, body).blob) == good
    spellings: list[list[Any]] = [
        [*body[:3], "ffn.[3:4].7", *body[4:]],
        [*body[:2], True, *body[3:]],
        [*body[:4], float(body[4]), *body[5:]],
        [*body, None],
        [*body[:6], None],
    ]
    for spelling in spellings:
        with pytest.raises(ProtocolError):
            GRANTS.read(sign_body(OWNER, GRANTS.domain, spelling).blob)
    for decode in (REVOCATIONS.read, APPOINTMENTS.read, RUNS.read):
        with pytest.raises(InvalidRecord):
            decode(good.blob)
