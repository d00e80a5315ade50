"""Every decision about primary and followers of bare names, and that all who see the same agree."""

from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.identity import PeerID
from tesseract_async.server.bare_names import BareRole, Contender, decide

LEAD = (BareRole.TRAIN, None)


def standing(number: int, version: int | None = 0, *, primary: bool = False) -> Contender:
    return Contender(PeerID(number.to_bytes(32, "big")), primary, version)


def test_a_single_server_leads() -> None:
    for primary in (False, True):
        assert decide(standing(1, primary=primary), [], listed=False) == LEAD


def test_a_primary_is_followed_and_its_follower_stays_with_it() -> None:
    primary, claimer = standing(2, None, primary=True), standing(3, 2**40, primary=True)
    assert decide(standing(1, 9), [primary, standing(3, 99)], listed=False) == (BareRole.FOLLOW, primary)
    assert decide(standing(1, 9), [primary, claimer], listed=False, followed=primary.owner) == (
        BareRole.FOLLOW,
        primary,
    )
    assert decide(standing(1, 9), [primary, claimer], listed=True, followed=primary.owner) == (BareRole.FOLLOW, claimer)


def test_a_running_primary_gives_way_to_no_version() -> None:
    me, claimer = standing(9, 5, primary=True), standing(1, 2**52, primary=True)
    assert decide(me, [claimer], listed=False) == LEAD
    assert decide(me, [claimer], listed=True) == (BareRole.FOLLOW, claimer)
    assert decide(me, [claimer], listed=False, is_new=True) == (BareRole.FOLLOW, claimer)
    assert decide(me, [claimer], listed=False, taken_from=claimer.owner) == (BareRole.FOLLOW, claimer)
    silent = standing(1, None, primary=True)
    for listed in (False, True):
        assert decide(me, [silent], listed=listed, is_new=True, taken_from=silent.owner) == LEAD


def test_without_a_primary_the_newest_takes_over_and_is_waited_for_once() -> None:
    old, new, silent = standing(1, 5), standing(2, 7), standing(3, None)
    for listed in (False, True):
        assert decide(new, [old, silent], listed=listed, has_waited=False) == LEAD
        assert decide(old, [new, silent], listed=listed, has_waited=False) == (BareRole.WAIT, None)
        assert decide(old, [new, silent], listed=listed) == LEAD


replicas = st.lists(
    st.tuples(st.integers(1, 50), st.integers(0, 3), st.booleans()),
    min_size=1,
    max_size=6,
    unique_by=lambda item: item[0],
)


@given(replicas, st.booleans())
def test_those_who_see_the_same_settle_on_one(known: list[tuple[int, int, bool]], listed: bool) -> None:
    servers = [standing(number, version, primary=primary) for number, version, primary in known]
    for _ in range(4):
        roles = [
            decide(one, [other for other in servers if other is not one], listed=listed, is_new=True, has_waited=False)
            for one in servers
        ]
        servers = [
            Contender(one.owner, role is BareRole.TRAIN, one.version)
            for one, (role, _) in zip(servers, roles, strict=True)
        ]
    assert sum(one.primary for one in servers) == 1
