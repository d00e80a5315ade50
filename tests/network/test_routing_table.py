"""The routing table against brute force over every contact that it holds."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tesseract_async.network.contacts import Contact
from tesseract_async.network.routing_table import QUESTIONABLE_AFTER, RoutingTable, common_prefix

MIDPOINT = 1 << 255
OWN = 0x5A << 248
# ids crowded around this node's id, the midpoints and the edges, where an error by one shows
IDS = st.one_of(
    st.integers(0, 2**256 - 1),
    st.integers(0, 255).map(lambda bit: OWN ^ (1 << bit)),
    st.integers(0, 2**12).map(lambda low: OWN ^ low),
    st.sampled_from([0, 1, MIDPOINT - 1, MIDPOINT, MIDPOINT + 1, 2**256 - 1, OWN]),
)


def contact(number: int, port: int = 4000) -> Contact:
    made = Contact(number.to_bytes(32, "big"), ("127.0.0.1", port))
    made.proven = True
    return made


def table(k: int = 3) -> RoutingTable:
    return RoutingTable(OWN.to_bytes(32, "big"), k=k, now=0.0)


@settings(deadline=None)
@given(st.lists(IDS, unique=True, max_size=120), IDS, st.integers(1, 30))
@example([MIDPOINT, MIDPOINT - 1, MIDPOINT + 1], MIDPOINT, 2)
def test_closest_is_brute_force_over_what_the_table_holds(numbers: list[int], target: int, count: int) -> None:
    routes = table()
    for number in numbers:
        routes.add(contact(number), 0.0)
    held = [item.number for item in routes.contacts()]
    expected = sorted(held, key=lambda number: number ^ target)[:count]
    assert [item.number for item in routes.closest(target, count)] == expected
    for number in [*held[:3], *expected[:2], *expected[-1:]]:
        others = sorted((item for item in held if item != number), key=lambda item: item ^ target)[:count]
        found = routes.closest(target, count, without=number.to_bytes(32, "big"))
        assert [item.number for item in found] == others
    assert len(routes) == len(held) == len(set(held))
    assert OWN not in held


@settings(deadline=None)
@given(st.lists(IDS, unique=True, max_size=200))
def test_every_contact_lies_in_the_bucket_of_its_prefix(numbers: list[int]) -> None:
    routes = table()
    for number in numbers:
        routes.add(contact(number), 0.0)
    last = len(routes.buckets) - 1
    for index, bucket in enumerate(routes.buckets):
        assert len(bucket.contacts) <= 3 and len(bucket.replacements) <= 3
        for item in [*bucket.contacts.values(), *bucket.replacements.values()]:
            shared = common_prefix(item.number, OWN)
            assert shared == index if index < last else shared >= last


@settings(deadline=None)
@given(st.lists(IDS, unique=True, max_size=200))
def test_the_nearest_k_of_all_that_were_seen_are_kept(numbers: list[int]) -> None:
    # section 2.4 of the paper: a node knows its own neighborhood completely, whatever order it heard of it in
    routes = table()
    for number in numbers:
        routes.add(contact(number), 0.0)
    nearest = sorted((number for number in numbers if number != OWN), key=lambda number: number ^ OWN)[:3]
    assert [item.number for item in routes.closest(OWN, 3)] == nearest


@settings(deadline=None)
@given(st.integers(0, 255), st.integers(0, 2**256 - 1))
def test_a_refreshed_bucket_gets_an_id_of_its_own(index: int, noise: int) -> None:
    assert common_prefix(table().number_in_bucket(index, noise), OWN) == index


def far(index: int) -> Contact:
    return contact((OWN ^ MIDPOINT) + index, 4000 + index)


def full_table() -> RoutingTable:
    routes = table()
    routes.add(contact(OWN ^ 1), 0.0)
    for index in range(3):
        routes.add(far(index), 0.0)
    assert routes.closest(far(0).number, 3)[0].number == far(0).number
    return routes


def test_a_silent_oldest_contact_is_to_be_pinged_and_a_lively_one_is_not() -> None:
    routes = full_table()
    for item in routes.contacts():
        item.last_seen = 100.0
    assert routes.add(far(3), 99.0 + QUESTIONABLE_AFTER) is None
    doubtful = routes.add(far(4), 101.0 + QUESTIONABLE_AFTER)
    assert doubtful is not None and doubtful.number == far(0).number


def test_a_contact_that_is_seen_moves_to_the_tail() -> None:
    routes = full_table()
    routes.add(far(0), 50.0)
    for item in routes.contacts():
        item.last_seen = 0.0
    doubtful = routes.add(far(3), QUESTIONABLE_AFTER)
    assert doubtful is not None and doubtful.number == far(1).number


def test_the_place_of_a_failed_contact_goes_to_the_latest_replacement() -> None:
    routes = full_table()
    for index in (3, 4, 5, 6):
        routes.add(far(index), 0.0)
    failed = routes.get(far(1).peer_id)
    assert failed is not None
    successor = routes.remove(failed)
    assert successor is not None and successor.number == far(6).number
    assert successor.peer_id in routes and failed.peer_id not in routes
    assert len(routes) == 4


def test_a_contact_at_another_address_does_not_remove_the_true_one() -> None:
    routes = full_table()
    assert routes.remove(contact(far(1).number, 9)) is None
    assert far(1).peer_id in routes
