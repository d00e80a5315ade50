"""Whom a node believes: its lists for bare names, a run's authority for its uids, both where there are both."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.admission import Policy
from tesseract_async.errors import ProtocolError
from tesseract_async.experts.authority import Authority
from tesseract_async.experts.grants import Grant, Role, sign_grant
from tesseract_async.experts.manifest import Manifest, RunTag, decode_manifest, encode_manifest, grid_key, shard_key
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.run import RunManifest, sign_run
from tesseract_async.experts.terms import EPOCH_ZERO
from tesseract_async.experts.trust import Trust
from tesseract_async.identity import Identity, verify
from tests.watching import calls_of

NOW = 1_800_000_000
ME, OWNER, HOST, STRANGER = (Identity.from_seed(bytes([n]) * 32) for n in range(1, 5))
RUN = sign_run(OWNER, RunManifest("digits", "ffn", (8, 8), "ffn"))
TAG = RunTag(OWNER.peer_id, "digits", "granted")


def in_run(policy: Policy | None = None) -> Trust:
    trust = Trust(ME.peer_id, policy, clock=lambda: NOW)
    trust.add(Authority(RUN))
    return trust


def grant(who: Identity, *roles: Role, pattern: str | None = None) -> Grant:
    return sign_grant(
        *(OWNER, TAG.run_id("ffn"), who.peer_id, roles or ("host",)),
        serial=NOW,
        not_after=NOW + 100,
        pattern=None if pattern is None else ExpertPattern.parse(pattern),
    )


def manifest(tag: RunTag | None = TAG, shown: Grant | None = None, *, prefix: str = "ffn") -> Manifest:
    experts = {(0, 1): True, (3, 7): False, (7, 7): True}
    ((part, _),) = encode_manifest(
        *(["10.0.0.1:1"], experts),
        prefix=prefix,
        sequence=1,
        tag=tag,
        grant=b"" if shown is None else shown.blob,
        epochs={(3, 7): 9},
    )
    return decode_manifest(part, prefix=prefix)


def test_a_manifest_of_a_run_comes_back_with_its_grant_and_epochs() -> None:
    shown = grant(HOST)
    read = manifest(TAG, shown)
    assert (read.tag, read.grant) == (TAG, shown.blob)
    assert read.epochs is not None and read.epochs.tolist() == [0, 9, 0]
    assert list(read.keys())[0] == grid_key("ffn", TAG) != grid_key("ffn")
    assert {shard_key(uid, TAG) for uid in ("ffn.0.1", "ffn.3.7", "ffn.7.7")} == set(list(read.keys())[1:])


def test_bytes_per_expert_in_a_run() -> None:
    many = {(x, y): True for x in range(20) for y in range(20)}
    parts = encode_manifest(["10.0.0.1:1"], many, prefix="ffn", sequence=1, tag=TAG, grant=grant(HOST).blob)
    (one, _), *_ = encode_manifest(["10.0.0.1:1"], {(0, 0): True}, prefix="ffn", sequence=1, tag=TAG, grant=b"")
    head = len(one) - 7 + len(grant(HOST).blob)
    assert len(parts) <= 5 and all(len(part) <= 880 for part, _ in parts)
    assert max((len(part) - head) / len(members) for part, members in parts) <= 6.2


@pytest.mark.parametrize("cut", [30, 60, 80, 120, 220])
def test_a_manifest_of_a_run_that_is_cut_short_is_malformed(cut: int) -> None:
    ((part, _),) = encode_manifest(["10.0.0.1:1"], {(1,): True}, prefix="ffn", sequence=1, tag=TAG, grant=bytes(160))
    for wrong in (part[:cut], part + b"\0", part[:14] + b"\3" + part[15:]):
        with pytest.raises(ProtocolError):
            decode_manifest(wrong)


def test_bare_names_go_by_the_list_and_no_list_is_everybody() -> None:
    everybody, listed = Trust(ME.peer_id), Trust(ME.peer_id, Policy.only([HOST.peer_id]))
    bare = manifest(None)
    for trust, who, believed in (
        (everybody, STRANGER, True),
        (listed, STRANGER, False),
        (listed, HOST, True),
        (listed, ME, True),  # who lists the others need not list itself
    ):
        assert trust.may_host(who.peer_id, "ffn.3.7") is believed
        assert trust.may_host(who.peer_id, "ffn.3.7", anew=True) is believed
        if believed:
            assert trust.believed(who.peer_id, bare) is bare
        else:
            with pytest.raises(ProtocolError):
                trust.believed(who.peer_id, bare)
    assert everybody.may_host(None, "ffn.3.7") and not listed.may_host(None, "ffn.3.7")
    assert everybody.may_ask(STRANGER.peer_id, "train", "ffn.3.7"), "the endpoint has asked the policy"


def test_in_a_run_only_what_is_of_the_run_is_believed() -> None:
    trust = in_run()
    assert trust.grid_key("ffn") == grid_key("ffn", TAG) and trust.grid_key("other") == grid_key("other")
    good = manifest(TAG, grant(HOST))
    assert not trust.may_host(HOST.peer_id, "ffn.3.7") and not trust.may_host(HOST.peer_id, "ffn.3.7", anew=True)
    assert trust.believed(HOST.peer_id, good) is good
    assert trust.may_host(HOST.peer_id, "ffn.3.7") and trust.may_host(HOST.peer_id, "ffn.3.7", anew=True)
    strange = [
        (HOST, manifest(None)),  # bare
        (HOST, manifest(RunTag(OWNER.peer_id, "letters", "granted"), grant(HOST))),
        (HOST, manifest(RunTag(OWNER.peer_id, "digits", "open"), grant(HOST))),
        (STRANGER, good),  # another's grant
        (STRANGER, manifest(TAG, grant(STRANGER, "train"))),
        (STRANGER, manifest(TAG)),
    ]
    for who, said in strange:
        with pytest.raises(ProtocolError):
            trust.believed(who.peer_id, said)
    assert trust.believed(STRANGER.peer_id, manifest(None, prefix="other")), "another prefix is not the run's"
    with pytest.raises(ProtocolError, match="another run"):
        trust.believed(HOST.peer_id, manifest(TAG, grant(HOST), prefix="other"))


def test_a_grant_for_some_experts_lets_those_pass() -> None:
    trust = in_run()
    read = trust.believed(HOST.peer_id, manifest(TAG, grant(HOST, pattern="ffn.[0:4].[0:8]")))
    assert read.coords.tolist() == [[0, 1], [3, 7]] and np.array_equal(read.primary, [True, False])
    assert read.epochs is not None and read.epochs.tolist() == [0, 9]
    assert trust.may_host(HOST.peer_id, "ffn.3.7") and not trust.may_host(HOST.peer_id, "ffn.7.7")
    for pattern in ("ffn.5.[0:8]", "ffn.3", "att.[0:8].[0:8]"):
        other = in_run()
        with pytest.raises(ProtocolError):
            other.believed(HOST.peer_id, manifest(TAG, grant(HOST, pattern=pattern)))
    assert trust.may_host(HOST.peer_id, "ffn.0.1", anew=True)
    assert not trust.may_host(HOST.peer_id, "ffn.7.7", anew=True)


@pytest.mark.parametrize(("ahead", "is_believed"), [(60, True), (61, False), (2**31, False)])
def test_an_epoch_from_the_future_ranks_last_and_its_server_is_still_found(ahead: int, is_believed: bool) -> None:
    trust, shown = in_run(), grant(HOST)
    epoch = min(2**32 - 1, NOW - EPOCH_ZERO + ahead)
    experts = {(0, 1): True, (0, 2): True}
    ((part, _),) = encode_manifest(
        ["10.0.0.1:1"], experts, prefix="ffn", sequence=1, tag=TAG, grant=shown.blob, epochs={(0, 1): epoch, (0, 2): 7}
    )
    believed = trust.believed(HOST.peer_id, decode_manifest(part, prefix="ffn"))
    assert believed.epochs is not None and believed.epochs.tolist() == [epoch if is_believed else 0, 7]


def test_a_list_and_a_run_both_have_to_allow() -> None:
    trust = in_run(Policy.only([HOST.peer_id]))
    assert trust.believed(HOST.peer_id, manifest(TAG, grant(HOST)))
    with pytest.raises(ProtocolError):
        trust.believed(STRANGER.peer_id, manifest(TAG, grant(STRANGER)))
    trust.introduced(STRANGER.peer_id, [grant(STRANGER).blob])
    assert not trust.may_host(STRANGER.peer_id, "ffn.3.7")


def test_what_a_peer_shows_in_its_hello_is_learned_if_it_is_its_own() -> None:
    trust = in_run()
    trust.introduced(STRANGER.peer_id, [b"garbage", grant(HOST, "train").blob])
    assert not trust.may_ask(STRANGER.peer_id, None, "ffn.3.7") and not trust.may_ask(HOST.peer_id, None, "ffn.3.7")
    trust.introduced(HOST.peer_id, [grant(HOST, "train").blob])
    assert trust.may_ask(HOST.peer_id, "train", "ffn.3.7") and trust.may_ask(HOST.peer_id, None, "ffn.3.7")
    assert not trust.may_ask(HOST.peer_id, "host", "ffn.3.7")
    assert trust.may_ask(ME.peer_id, "train", "ffn.3.7"), "a node asks itself whatever it likes"
    assert trust.shown() == []
    trust.introduced(ME.peer_id, [grant(ME).blob])
    assert trust.shown() == [grant(ME).blob] == [trust.own_grant("ffn")]


def test_a_prefix_is_one_runs_at_one_node() -> None:
    trust = in_run()
    trust.add(Authority(RUN))
    with pytest.raises(ValueError, match="uids of 'ffn' are those of the run digits@"):
        trust.add(Authority(sign_run(OWNER, RunManifest("letters", "ffn", (8, 8), "ffn"))))
    trust.add(Authority(sign_run(OWNER, RunManifest("letters", "att", (8, 8), "ffn"))))


OTHER = RunTag(OWNER.peer_id, "letters", "granted")
SHOWN = [
    b"",
    grant(HOST).blob,
    grant(STRANGER, "train", "share").blob,
    sign_grant(OWNER, OTHER.run_id("ffn"), STRANGER.peer_id, ["host"], serial=1, not_after=2**39).blob,
    sign_grant(STRANGER, TAG.run_id("ffn"), STRANGER.peer_id, ["host", "admit"], serial=1, not_after=2**39).blob,
]


@given(
    st.sampled_from(SHOWN) | st.binary(max_size=480),
    st.sampled_from(
        [None, TAG, OTHER, RunTag(STRANGER.peer_id, "digits", "granted"), RunTag(OWNER.peer_id, "x", "open")]
    ),
    st.integers(0, 2**48 - 1),
    st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from(SHOWN) | st.binary(max_size=200), max_size=6),
)
def test_nothing_that_a_stranger_shows_or_says_is_believed(
    shown: bytes, tag: RunTag | None, sequence: int, epoch: int, hello: list[bytes]
) -> None:
    trust = in_run()
    trust.introduced(STRANGER.peer_id, hello)
    ((part, _),) = encode_manifest(
        *(["10.0.0.1:1"], {(3, 7): True}), prefix="ffn", sequence=sequence, tag=tag, grant=shown, epochs={(3, 7): epoch}
    )
    with pytest.raises(ProtocolError):
        trust.believed(STRANGER.peer_id, decode_manifest(part))
    assert not trust.may_host(STRANGER.peer_id, "ffn.3.7") and not trust.may_host(
        STRANGER.peer_id, "ffn.3.7", anew=True
    )
    assert not trust.may_ask(STRANGER.peer_id, "host", "ffn.3.7")
    view = trust.authority("ffn")
    assert view is not None and {one.peer for one in view.grants()} <= {STRANGER.peer_id}, "only what is its own"
    assert not view.may(STRANGER.peer_id, "admit", now=None)


def test_a_grant_is_checked_once_however_often_it_is_shown() -> None:
    trust = in_run()
    hosts = [Identity.from_seed(number.to_bytes(32, "big")) for number in range(1000, 1010)]
    said = [(host, manifest(TAG, grant(host))) for host in hosts]
    with calls_of(verify) as checked:
        for _ in range(20):
            for host, words in said:
                trust.believed(host.peer_id, words)
                trust.introduced(host.peer_id, [words.grant])
                assert trust.may_host(host.peer_id, "ffn.3.7")
    assert 0 < len(checked) <= 2 * len(hosts), "once where it was signed here, once where it was read"


def test_what_trainers_share_is_the_runs_too() -> None:
    trust, shown = in_run(), grant(HOST)
    with pytest.raises(ProtocolError):
        trust.believed(STRANGER.peer_id, manifest(TAG, prefix="ffn-shared"))
    assert trust.believed(HOST.peer_id, manifest(TAG, shown, prefix="ffn-shared")).prefix == "ffn-shared"
    assert trust.may_host(HOST.peer_id, "ffn-shared.0") and not trust.may_host(STRANGER.peer_id, "ffn-shared.0")
    assert not trust.may_ask(HOST.peer_id, "share", "ffn-shared.0")  # it may only host
    assert grid_key("ffn-shared", TAG) != grid_key("ffn", TAG)
    with pytest.raises(ValueError, match="'ffn-shared' are those of the run"):
        trust.add(Authority(sign_run(OWNER, RunManifest("other", "ffn-shared", (8,), "ffn"))))
    assert trust.shown() == []
