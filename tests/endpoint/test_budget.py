"""The bounds on bytes that connections share: never exceeded, no peer waits for another one, nothing leaks."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.endpoint.budget import FLOOR, Budget, FairCount, NodeBudgets, Owner, Reservation

MIB = 2**20


class Holder:
    """Notes what it hears of its reservations."""

    def __init__(self) -> None:
        self.granted: list[Reservation] = []
        self.given_up: list[Reservation] = []

    def room_changed(self, room: Reservation) -> None:
        (self.given_up if room.released else self.granted).append(room)


def owner(peer: int, group: int | None = None) -> Owner:
    return Owner(f"range {peer if group is None else group}", peer)


def given_up(budget: Budget) -> list[Owner]:
    """Whose messages were given up since the last time."""
    rooms = [room for room in budget.changed if room.released]
    budget.changed.clear()
    return [room.owner for room in rooms]


def arriving(budget: Budget, who: Owner, size: int, num_bytes: int) -> Reservation:
    """A message of which `num_bytes` have come."""
    reservation = budget.begin(who, size)
    assert reservation.fill(num_bytes)
    return reservation


def test_what_is_announced_and_does_not_come_takes_nothing_from_others() -> None:
    budget = Budget(1024 * MIB)
    for peer in range(200):
        reservation = budget.ask(owner(peer), 1000 * MIB)
        assert reservation.granted
    assert budget.used == 0
    honest = budget.ask(owner(1000), 1000 * MIB)
    assert honest.granted and honest.fill(1000 * MIB) and budget.used == 1000 * MIB


def test_a_peers_messages_beyond_its_share_wait_for_its_own_ones_only() -> None:
    budget = Budget(80 * MIB)
    large = budget.ask(owner(1), 70 * MIB)
    second = budget.ask(owner(1), 6 * MIB)
    third = budget.ask(owner(1), 5 * MIB)
    fourth = budget.ask(owner(1), 4 * MIB)
    assert large.granted and not second.granted and budget.num_waiting == 3
    assert budget.ask(owner(2), 70 * MIB).granted
    third.release()
    large.release()
    assert list(budget.changed) == [second, fourth] and fourth.granted and budget.num_waiting == 0
    with pytest.raises(ValueError, match="never fit"):
        budget.ask(owner(3), 81 * MIB)


def test_holders_hear_of_grants_and_of_what_was_given_up_when_it_is_delivered() -> None:
    budgets, first, second = NodeBudgets(32 * MIB), Holder(), Holder()
    one = budgets.messages.ask(Owner("a", 1, first), 30 * MIB)
    waiting = budgets.messages.ask(Owner("a", 1, first), 30 * MIB)
    assert one.fill(30 * MIB) and not first.granted
    late = budgets.messages.begin(Owner("b", 2, second), 5 * MIB)
    assert late.fill(5 * MIB) and not first.given_up, "nobody is told before the cycle ends"
    reply = budgets.replies.keep(Owner("b", 2, second), 16 * MIB)
    assert reply is not None and budgets.replies.keep(Owner("c", 3, first), MIB) is not None
    budgets.deliver()
    assert first.given_up == [one] and first.granted == [waiting] and second.given_up == [reply]
    assert not budgets.changed


def test_who_holds_most_makes_room() -> None:
    budget = Budget(100 * MIB)
    greedy, modest = owner(1), owner(2)
    for _ in range(4):
        arriving(budget, greedy, 30 * MIB, 15 * MIB)
    arriving(budget, modest, 30 * MIB, 30 * MIB)
    assert not given_up(budget)
    assert arriving(budget, modest, 10 * MIB, 10 * MIB).num_bytes == 10 * MIB
    assert not given_up(budget) and budget.used == 100 * MIB
    arriving(budget, owner(3), 10 * MIB, 5 * MIB)
    assert given_up(budget) == [greedy] and budget.used == 90 * MIB


def test_identities_of_one_range_count_together() -> None:
    budget = Budget(100 * MIB)
    for peer in range(10):
        arriving(budget, owner(peer, group=1), 6 * MIB, 6 * MIB)
    arriving(budget, owner(20), 40 * MIB, 40 * MIB)
    arriving(budget, owner(21), 6 * MIB, 6 * MIB)
    assert [one.group for one in given_up(budget)] == ["range 1"]


def test_who_holds_most_is_refused_rather_than_others() -> None:
    budget = Budget(100 * MIB)
    arriving(budget, owner(1), 40 * MIB, 40 * MIB)
    greedy = budget.begin(owner(2), 90 * MIB)
    assert greedy.fill(60 * MIB) and not greedy.fill(61 * MIB)
    assert given_up(budget) == [owner(2)]
    assert budget.used == 40 * MIB


def test_what_has_arrived_whole_is_never_taken_back() -> None:
    budget = Budget(10 * MIB)
    whole = arriving(budget, owner(1), 8 * MIB, 8 * MIB)
    whole.keep()
    late = budget.begin(owner(2), 4 * MIB)
    assert not late.fill(4 * MIB) and given_up(budget) == [owner(2)] and not whole.released
    assert budget.used == 8 * MIB


def test_a_message_counts_a_page_from_its_first_byte_on() -> None:
    budget = Budget(1000 * MIB)
    large, small = budget.begin(owner(1), 900 * MIB), budget.begin(owner(1), 100_000)
    assert large.fill(0) and small.fill(0)
    assert large.num_bytes == FLOOR and small.num_bytes == 100_000


def test_windows_are_promises_and_no_range_gets_all_of_them() -> None:
    budget = Budget(160 * MIB)
    opened = [budget.open_window(owner(peer, group=1), 16 * MIB) for peer in range(10)]
    assert opened.count(True) == 2
    assert budget.open_window(owner(20), 16 * MIB) and budget.windows == 48 * MIB and budget.used == 0
    for peer in (0, 1):
        budget.close_window(owner(peer, group=1), 16 * MIB)
    budget.close_window(owner(20), 16 * MIB)
    assert budget.windows == 0 and not budget.num_peers


def test_replies_beyond_a_peers_share_are_refused_and_one_always_waits() -> None:
    budget = Budget(80 * MIB)
    assert budget.keep(owner(1), 60 * MIB) is not None
    assert budget.keep(owner(1), MIB) is None
    assert budget.keep(owner(2), 10 * MIB) is not None
    assert budget.keep(owner(2), MIB) is None
    assert budget.keep(owner(3), 81 * MIB) is None
    assert budget.used == 70 * MIB


@given(st.integers(0, 2**32))
def test_the_bound_holds_and_nothing_leaks(seed: int) -> None:
    pick = random.Random(seed)
    budget = Budget(40 * MIB)
    alive: list[Reservation] = []

    for _ in range(60):
        what = pick.random()
        if what < 0.4 or not alive:
            peer = pick.randrange(6)
            alive.append(budget.ask(owner(peer, group=peer // 2), pick.randrange(1, 40 * MIB)))
        elif what < 0.8:
            one = pick.choice(alive)
            if one.granted:
                one.fill(pick.randrange(one.size + 1))
        else:
            pick.choice(alive).release() if pick.random() < 0.5 else alive.pop().release()
        alive[:] = [one for one in alive if not one.released]
        assert 0 <= budget.used <= 40 * MIB
        assert budget.used == sum(one.num_bytes for one in alive)
    for one in list(alive):
        one.release()
    assert budget.used == 0 and budget.num_waiting == 0 and not budget.num_peers


def test_something_is_always_left_of_what_cannot_be_taken_back() -> None:
    count = FairCount(1000)
    taken = dict.fromkeys(range(40), 0)
    for peer in taken:
        while count.take(owner(peer), 1):
            taken[peer] += 1
    assert taken[0] == 333 and count.used <= 1000
    assert min(taken.values()) >= 0 and taken[3] > 80
    crowd = FairCount(1000)
    held = {}
    for peer in range(100):
        held[peer] = 0
        while crowd.take(owner(peer, group=1), 1):
            held[peer] += 1
    assert sum(held.values()) == 500, "one range leaves half, whatever it calls itself"
    assert crowd.take(owner(200), 100)
    for peer in range(100):
        crowd.give_back(owner(peer, group=1), held[peer])
    crowd.give_back(owner(200), 100)
    assert crowd.used == 0 and crowd.take(owner(0, group=1), 333), "as if nothing had been"


def test_a_thousand_grants_at_once_are_told_one_after_the_other() -> None:
    budgets = NodeBudgets(2**30)
    heard: list[Reservation] = []

    class Driver:
        def room_changed(self, room: Reservation) -> None:
            heard.append(room)
            budgets.deliver()  # as every cycle of a connection ends

    owner = Owner("range", "peer", Driver())
    large = budgets.messages.ask(owner, budgets.messages.share)
    waiting = [budgets.messages.ask(owner, 100_000) for _ in range(1000)]
    large.release()
    budgets.deliver()
    assert heard == waiting
