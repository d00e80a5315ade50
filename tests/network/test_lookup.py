"""The lookup against brute force over whole simulated networks, answered by function calls."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tesseract_async.network.contacts import Contact
from tesseract_async.network.lookup import MAX_IN_VAIN, Lookup


def contacts(rng: random.Random, count: int) -> list[Contact]:
    return [Contact(rng.randbytes(32), ("127.0.0.1", 1 + index)) for index in range(count)]


def contact(number: int) -> Contact:
    return Contact(number.to_bytes(32, "big"), ("127.0.0.1", 1 + number % 60000))


def nearest(known: list[Contact], target: int, count: int) -> list[Contact]:
    return sorted(known, key=lambda item: item.number ^ target)[:count]


def run(lookup: Lookup, answer: dict[bytes, list[Contact]], dead: set[bytes] = frozenset()) -> int:  # type: ignore[assignment]
    """Answers every question at once; returns how many were asked."""
    num_asked = 0
    while not lookup.finished:
        asked = lookup.to_ask()
        assert asked, "a lookup that is not finished asks somebody"
        for item in asked:
            num_asked += 1
            if item.raw in dead:
                lookup.failed(item)
            else:
                lookup.answered(item, answer[item.raw])
    return num_asked


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 4), st.floats(0, 0.25))
def test_finds_the_nearest_k_that_live(seed: int, size: int, num_paths: int, share_dead: float) -> None:
    """Where more are dead, an honest node that names several of them in a row is taken for a liar now and then."""
    rng = random.Random(seed)
    everybody = contacts(rng, size)
    dead = {item.raw for item in everybody if rng.random() < share_dead}
    target = rng.getrandbits(256)
    # everybody names the 10 nearest that it knows of; it knows everybody
    answer = {item.raw: nearest(everybody, target, 10) for item in everybody}
    start = rng.sample(everybody, min(size, 6))
    lookup = Lookup(target, start, k=10, num_paths=num_paths, alpha=3)
    run(lookup, answer, dead)
    alive = [item for item in everybody if item.raw not in dead]
    if any(item.raw not in dead for item in start):
        expected = [item for item in nearest(everybody, target, 10) if item in alive]
        assert lookup.closest()[: len(expected)] == expected


def test_nobody_is_asked_twice_and_no_more_than_alpha_at_once() -> None:
    rng = random.Random(1)
    everybody = contacts(rng, 100)
    target = rng.getrandbits(256)
    lookup = Lookup(target, everybody[:20], k=20, num_paths=4, alpha=8)
    asked: list[bytes] = []
    waiting: list[Contact] = []
    while not lookup.finished:
        waiting += lookup.to_ask()
        assert len(waiting) <= 8
        item = waiting.pop(rng.randrange(len(waiting)))
        asked.append(item.raw)
        lookup.answered(item, nearest(everybody, target, 20))
    assert len(asked) == len(set(asked))


def test_a_liar_leads_one_path_astray_and_the_others_arrive() -> None:
    rng = random.Random(2)
    everybody = contacts(rng, 200)
    target = rng.getrandbits(256)
    # liars whose ids lie nearer than anybody's, each naming further ones: they would fill every shortlist
    liars = [Contact((target ^ (index + 1)).to_bytes(32, "big"), ("127.0.0.1", 9000 + index)) for index in range(300)]
    answer = {item.raw: nearest(everybody, target, 8) for item in everybody}
    answer.update((item.raw, liars) for item in liars)
    start = [liars[0], *everybody[:7]]
    lookup = Lookup(target, start, k=8, num_paths=4, alpha=8)
    asked: set[bytes] = set()
    while not lookup.finished and len(asked) < 2000:
        for item in lookup.to_ask():
            asked.add(item.raw)
            lookup.answered(item, answer[item.raw])
    assert {item.raw for item in nearest(everybody, target, 8)} <= asked


def test_a_path_that_asks_one_at_a_time_hears_a_second_opinion_before_it_ends() -> None:
    rng = random.Random(5)
    everybody, liars = contacts(rng, 300), contacts(rng, 40)
    target = rng.getrandbits(256)
    answer = {item.raw: nearest(everybody, target, 8) for item in everybody}
    answer.update((item.raw, nearest(liars, target, 8)) for item in liars)
    # the four nearest of the start, and so the first question of each path, are liars
    far = nearest(everybody, ~target % 2**256, 16)
    lookup = Lookup(target, [*nearest(liars, target, 4), *far], k=8, num_paths=4, alpha=8)
    lookup.max_in_progress = 4
    asked: set[bytes] = set()
    while not lookup.finished:
        for item in lookup.to_ask():
            asked.add(item.raw)
            lookup.answered(item, answer[item.raw])
    assert {item.raw for item in nearest(everybody, target, 4)} <= asked


def test_a_narrow_lookup_spreads_its_questions_over_the_paths() -> None:
    rng = random.Random(6)
    target = rng.getrandbits(256)
    start = sorted(contacts(rng, 20), key=lambda contact: contact.number ^ target)
    lookup = Lookup(target, start, k=8, num_paths=4, alpha=8)
    lookup.max_in_progress = 4
    first = lookup.to_ask()
    assert len(first) == 4 and lookup.to_ask() == []
    # the contacts of the start are dealt to the paths in turn, nearest first
    assert sorted(start.index(item) % 4 for item in first) == [0, 1, 2, 3]
    lookup.max_in_progress = 8
    assert len(lookup.to_ask()) == 4, "as many again when the read is late"


def test_a_late_contact_frees_its_place_and_may_still_answer() -> None:
    rng = random.Random(3)
    start = contacts(rng, 4)
    lookup = Lookup(0, start, k=4, num_paths=1, alpha=1)
    (first,) = lookup.to_ask()
    assert lookup.to_ask() == []
    lookup.stalled(first)
    (second,) = lookup.to_ask()
    assert second is not first
    lookup.answered(first, [])
    assert lookup.closest() == [first]


def test_rounds_count_the_longest_chain() -> None:
    chain = [Contact((1 << (255 - index)).to_bytes(32, "big"), ("127.0.0.1", 1 + index)) for index in range(5)]
    lookup = Lookup(0, chain[:1], k=2, num_paths=1, alpha=1)
    run(lookup, {item.raw: chain[index + 1 : index + 2] for index, item in enumerate(chain)})
    assert lookup.num_rounds == 5
    assert lookup.closest() == [chain[4], chain[3]]


def test_without_contacts_it_is_finished_at_once() -> None:
    assert Lookup(0, [], k=20, num_paths=4, alpha=8).finished


def test_one_address_range_has_few_places_among_the_closest() -> None:
    crowd = [Contact(bytes(31) + bytes([index]), ("8.8.8.8", 4000 + index)) for index in range(1, 5)]
    crowd += [Contact(bytes(31) + bytes([index]), (f"2a01:db8:7:{index}::1", 4000)) for index in range(5, 9)]
    others = [Contact(bytes(30) + bytes([1, index]), (f"8.8.{index}.8", 4000)) for index in range(1, 5)]
    lookup = Lookup(0, [*crowd, *others], k=6, num_paths=4, alpha=12)
    run(lookup, {item.raw: [] for item in [*crowd, *others]})
    assert lookup.closest() == crowd[:6]
    # two of the /24, two of the /48, whatever their ids, and then those who live elsewhere
    expected = [*crowd[:2], *crowd[4:6], *others[:2]]
    assert lookup.closest(max_per_range=2) == expected


def test_a_teller_of_contacts_that_do_not_answer_is_believed_no_more() -> None:
    lookup = Lookup(0, [contact(2**200)], k=20, num_paths=1, alpha=2)
    (liar,) = lookup.to_ask()
    named = [contact(index) for index in range(1, 21)]
    lookup.answered(liar, named)
    asked = 0
    while waiting := lookup.to_ask():
        asked += len(waiting)
        for one in waiting:
            lookup.stalled(one)
    assert asked <= MAX_IN_VAIN + 1 and not lookup.finished
    for one in named[:asked]:
        lookup.failed(one)
    assert lookup.finished


def test_what_somebody_else_names_too_is_asked_all_the_same() -> None:
    lookup = Lookup(0, [contact(2**200), contact(2**201)], k=20, num_paths=1, alpha=2)
    liar, honest = lookup.to_ask()
    there = contact(100)
    lookup.answered(liar, [*(contact(index) for index in range(1, 9)), there])
    while waiting := lookup.to_ask():
        for one in waiting:
            lookup.failed(one)
    lookup.answered(honest, [there])
    assert lookup.to_ask() == [there]
    lookup.answered(there, [])
    assert lookup.finished and there in lookup.closest()


def test_a_teller_may_name_some_contacts_that_have_gone_if_others_answer() -> None:
    lookup = Lookup(0, [contact(2**200)], k=20, num_paths=1, alpha=1)
    (teller,) = lookup.to_ask()
    named = [contact(index) for index in range(1, 21)]
    lookup.answered(teller, named)
    for position in range(20):
        (one,) = lookup.to_ask()
        (lookup.failed if position % 2 else lambda who: lookup.answered(who, []))(one)
    assert lookup.finished and len(lookup.closest()) == 11
