"""The waiting room: bounded, nobody's crowd keeps others out, and who has just come is not sent away."""

from tesseract_async.endpoint.connection_limits import WaitingRoom, descriptor_limit, room_for
from tesseract_async.transport.base import range_of


def test_a_crowd_makes_room_for_others_once_it_has_settled() -> None:
    room: WaitingRoom[int] = WaitingRoom(most=8, most_per_group=6)
    for guest in range(6):
        assert room.enter(guest, "a", 0.0) == (True, None)
    assert room.enter(6, "a", 0.5) == (False, None), "they have just come"
    assert room.enter(6, "b", 0.5) == (True, None) and room.enter(7, "b", 0.5) == (True, None)
    assert room.enter(8, "c", 0.9) == (True, 0), "the oldest of those with most"
    assert room.enter(9, "a", 1.0) == (True, 1), "who has most makes room itself"
    assert len(room) == 8
    for guest in room.guests():
        room.leave(guest)
        room.leave(guest)
    assert not len(room) and not room._groups


def test_silent_crowds_of_many_addresses_never_keep_a_newcomer_out() -> None:
    room: WaitingRoom[int] = WaitingRoom(most=512, most_per_group=64)
    waiting: set[int] = set()
    guest = 0
    for step in range(2000):
        now = step * 0.01
        for host in range(20):  # those sent away come again at once
            guest += 1
            welcome, victim = room.enter(guest, host, now)
            if welcome:
                waiting.add(guest)
            waiting.discard(victim or 0)
        assert len(room) <= 512
        if now > 2.0 and step % 10 == 0:
            guest += 1
            assert room.enter(guest, "newcomer", now)[0]
            room.leave(guest)


def test_neighbors_share_their_limits() -> None:
    assert range_of("8.8.8.8") == range_of("8.8.8.200") == range_of("::ffff:8.8.8.1") == "8.8.8.0/24"
    assert range_of("8.8.9.8") != range_of("8.8.8.8")
    assert range_of("2a00:1:2:3::1") == range_of("2a00:1:2:3:ffff::2") != range_of("2a00:1:2:4::1")
    assert range_of("10.0.0.1") != range_of("10.0.0.2"), "in a private network each is on its own"
    assert range_of("127.0.0.1") is None and range_of("::1") is None and range_of("") is None


def test_descriptors_are_left_for_files() -> None:
    for limit in (256, 1024, 4096, 65536):
        room = room_for(limit)
        assert 2 * room.connections + 2 * room.half_open + 2 * room.splices <= limit
        assert 2 * room.connections + 2 * room.half_open <= 0.9 * limit
    assert descriptor_limit() > 0
