"""Every decision about primary and followers, and that all who see the same agree."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.identity import PeerID
from tesseract_async.server.roles import Role, Standing, decide


def standing(number: int, version: int | None = 0, *, primary: bool = False) -> Standing:
    return Standing(PeerID(number.to_bytes(32, "big")), primary, version)


def test_a_single_server_leads() -> None:
    assert decide(standing(1), []) == (Role.LEAD, None)
    assert decide(standing(1, primary=True), []) == (Role.LEAD, None)


def test_a_living_primary_is_followed_even_if_it_has_fewer_steps_or_does_not_answer() -> None:
    for version in (0, None):
        primary = standing(2, version, primary=True)
        assert decide(standing(1, 9), [primary, standing(3, 99)]) == (Role.FOLLOW, primary)


def test_without_a_primary_the_newest_takes_over() -> None:
    old, new, silent = standing(1, 5), standing(2, 7), standing(3, None)
    assert decide(new, [old, silent]) == (Role.LEAD, None)
    assert decide(old, [new, silent]) == (Role.FOLLOW, new)


def test_of_equals_the_lower_id_takes_over() -> None:
    low, high = standing(1, 5), standing(2, 5)
    assert decide(low, [high]) == (Role.LEAD, None)
    assert decide(high, [low]) == (Role.FOLLOW, low)


def test_of_two_primaries_the_one_with_more_steps_stays() -> None:
    few, many = standing(1, 5, primary=True), standing(2, 6, primary=True)
    assert decide(many, [few]) == (Role.LEAD, None)
    assert decide(few, [many]) == (Role.FOLLOW, many)
    assert decide(few, [standing(2, None, primary=True)]) == (Role.LEAD, None)


replicas = st.lists(
    st.tuples(st.integers(1, 50), st.integers(0, 3), st.booleans()),
    min_size=1,
    max_size=6,
    unique_by=lambda item: item[0],
)


@given(replicas)
def test_those_who_see_the_same_settle_on_one(known: list[tuple[int, int, bool]]) -> None:
    servers = [standing(number, version, primary=primary) for number, version, primary in known]
    for _ in range(3):
        roles = [decide(one, [other for other in servers if other is not one]) for one in servers]
        servers = [
            Standing(one.owner, role is Role.LEAD, one.version) for one, (role, _) in zip(servers, roles, strict=True)
        ]
    assert sum(one.primary for one in servers) == 1
    for (role, leader), one in zip(roles, servers, strict=True):
        assert (role is Role.LEAD) == (leader is None) == one.primary
