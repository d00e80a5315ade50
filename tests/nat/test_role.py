"""`RoleMachine` in made-up time: what a node finds out about its place in the network, and what follows from that."""

from dataclasses import replace

import pytest

from tesseract_async.nat.role import (
    CHECK_PERIOD,
    WATCH_PERIOD,
    CheckDue,
    HostsChanged,
    ListeningAddress,
    MappingDoubted,
    NatKind,
    Notice,
    Observation,
    Reachability,
    RoleEvent,
    RoleFound,
    RoleMachine,
    kind_of_nat,
)

PORT = 31337
V4 = ListeningAddress("0.0.0.0", PORT, (f"192.168.1.2:{PORT}",), (4,))
BOTH = ListeningAddress("::", PORT, (f"192.168.1.2:{PORT}",), (4, 6))
OUTSIDE = "198.51.100.7"
HERE = ["192.168.1.2"]
HERE_V6 = ["192.168.1.2", "2001:db8::2"]


def events(machine: RoleMachine) -> list[RoleEvent]:
    return [event for event in machine.events() if not isinstance(event, Notice)]


def begun(
    address: ListeningAddress = V4, hosts: list[str] = HERE, *, public: bool = False, client: bool = False
) -> RoleMachine:
    machine = RoleMachine(address, is_declared_public=public, is_declared_client=client)
    assert machine.timer_at() is None, "nobody is known yet"
    machine.joined(hosts, 0.0)
    return machine


def check(machine: RoleMachine, now: float = 0.0, /, **dialed: tuple[bool, str]) -> list[RoleEvent]:
    """One check that is due ends so, by version of IP (`v4`, `v6`); what follows."""
    assert isinstance(events(machine)[-1], CheckDue) and machine.timer_at() is None
    machine.checked(Observation({int(version[1]): found for version, found in dialed.items()}), now)
    return events(machine)


def look_again(machine: RoleMachine, now: float, hosts: list[str] = HERE) -> None:
    machine.look_again(now)
    assert (machine.timer_at() or 0.0) <= now
    machine.handle_timer(hosts, now)


def test_the_role_follows_and_others_are_told() -> None:
    machine = begun()
    assert check(machine, v4=(True, OUTSIDE)) == [RoleFound(became_client=False, is_news=True)]
    assert machine.reachability.role == "public" and not machine.behind_nat
    told = machine.told_addresses(has_rendezvous=False)
    assert told == machine.public_addresses == (f"{OUTSIDE}:{PORT}", f"192.168.1.2:{PORT}")
    assert "takes full part" in machine.reachability.sentences(PORT)[0]
    look_again(machine, 10.0)
    assert check(machine, 12.0, v4=(False, OUTSIDE)) == [
        MappingDoubted(),
        RoleFound(became_client=True, is_news=True),
    ]
    assert machine.reachability.role == "client" and machine.behind_nat and not machine.public_addresses
    assert machine.told_addresses(has_rendezvous=False) == V4.announced, "nothing better is known"
    assert machine.told_addresses(has_rendezvous=True) == ()
    assert "forward TCP and UDP port" in " ".join(machine.reachability.sentences(PORT))
    look_again(machine, 20.0)
    assert check(machine, 22.0) == [RoleFound(became_client=False, is_news=False)], (
        "nobody tells: what was known stands"
    )
    assert machine.reachability.role == "client"


def test_it_is_found_out_anew_now_and_then_and_soon_where_nobody_could_be_asked() -> None:
    machine = begun()
    check(machine, 1.0)
    assert machine.reachability.tcp is None and machine.timer_at() == WATCH_PERIOD
    machine.handle_timer(HERE, 6.0)
    check(machine, 7.0, v4=(True, OUTSIDE))
    now = 7.0
    while now < 7.0 + CHECK_PERIOD:
        assert not events(machine)
        now = machine.timer_at() or 0.0
        machine.handle_timer(HERE, now)
    assert events(machine) == [CheckDue({4: PORT}, stun=True)]


def test_a_change_of_network_is_noticed() -> None:
    machine = begun()
    check(machine, v4=(True, OUTSIDE))
    machine.handle_timer(HERE, WATCH_PERIOD)
    assert not events(machine)
    machine.handle_timer(["10.9.9.9"], 2 * WATCH_PERIOD)
    assert events(machine) == [MappingDoubted(), HostsChanged(), CheckDue({4: PORT}, stun=True)]


def test_what_comes_up_during_a_check_is_looked_at_after_it() -> None:
    machine = begun()
    machine.look_again(0.5)
    machine.handle_timer(["10.9.9.9"], 0.5)
    check(machine, 1.0, v4=(True, OUTSIDE))
    assert machine.timer_at() == 1.0


def test_ipv6_where_ipv4_is_behind_a_nat() -> None:
    machine = begun(BOTH, HERE_V6)
    assert list(machine.events()) == [CheckDue({4: PORT, 6: PORT}, stun=True)]
    machine.checked(Observation({4: (False, OUTSIDE), 6: (True, "2001:db8::2")}, "keeping"), 0.0)
    address = f"[2001:db8::2]:{PORT}"
    assert machine.reachability.role == "client" and machine.behind_nat and not machine.symmetric
    assert machine.told_addresses(has_rendezvous=False) == machine.public_addresses == (address,)
    assert address in " ".join(machine.reachability.sentences(PORT))
    events(machine)
    look_again(machine, 1.0, HERE_V6)
    check(machine, 1.0, v6=(True, "2001:db8::2"))
    assert machine.reachability.role == "client", "IPv6 alone says nothing about the rest"


def test_ipv4_that_works_besides_ipv6_that_does_not() -> None:
    machine = begun(BOTH, HERE_V6)
    check(machine, v4=(True, OUTSIDE), v6=(False, "2001:db8::2"))
    assert machine.reachability.role == "public"
    assert not any("2001:db8" in address for address in machine.public_addresses)
    assert "By IPv6 (2001:db8::2) it is not reached" in " ".join(machine.reachability.sentences(PORT))


def test_ipv6_alone_is_enough() -> None:
    machine = begun(BOTH, ["2001:db8::2"])
    assert events(machine) == [CheckDue({6: PORT}, stun=True)]
    machine.checked(Observation({6: (True, "2001:db8::2")}), 0.0)
    assert machine.reachability.role == "public" and machine.public_addresses[0] == f"[2001:db8::2]:{PORT}"


def test_a_node_that_knows_that_it_cannot_be_dialed_asks_for_its_kind_of_nat_only() -> None:
    machine = RoleMachine(V4, is_declared_client=True)
    assert events(machine) == [RoleFound(became_client=True, is_news=True)]
    machine.joined(HERE, 0.0)
    assert events(machine) == [CheckDue({}, stun=True)]
    machine.checked(Observation({}, "symmetric", OUTSIDE), 0.0)
    assert machine.reachability == Reachability(tcp=False, host=OUTSIDE, nat="symmetric") and machine.symmetric


@pytest.mark.parametrize("reached", [True, False])
def test_a_mapped_port_is_believed_when_others_got_through(reached: bool) -> None:
    machine = begun()
    machine.mapped(5555, 0.0)
    check(machine, v4=(False, OUTSIDE))
    machine.handle_timer(HERE, 0.0)
    assert list(machine.events())[-1] == CheckDue({4: 5555}, stun=True)
    machine.checked(Observation({4: (reached, OUTSIDE)}), 1.0)
    assert machine.public_addresses[:1] == ((f"{OUTSIDE}:5555",) if reached else ())


def test_udp_that_is_not_reached_makes_a_client_of_the_dht_only() -> None:
    machine = begun()
    machine.checked(Observation({4: (True, OUTSIDE)}, udp=False), 0.0)
    assert machine.reachability.role == "client" and machine.public_addresses
    assert "holds no keys" in machine.reachability.sentences(PORT)[0]


def test_a_declared_public_node_is_believed_and_told_where_others_find_otherwise() -> None:
    address = replace(V4, announced=("203.0.113.5:4000",))
    machine = begun(address, public=True)
    assert machine.reachability == Reachability(tcp=True)
    assert list(machine.events()) == [CheckDue({4: 4000}, stun=False)]
    machine.checked(Observation({4: (False, OUTSIDE)}), 0.0)
    [notice] = machine.events()
    assert notice == Notice(machine.doubt, is_warning=True)
    assert f"{OUTSIDE}:4000" in machine.doubt and "announces 203.0.113.5:4000" in machine.doubt
    assert machine.public_addresses == address.announced and machine.reachability.role == "public"
    assert machine.timer_at() == CHECK_PERIOD, "its addresses are not watched"
    look_again(machine, 1.0)
    assert isinstance(*machine.events(), CheckDue)
    machine.checked(Observation({4: (False, OUTSIDE)}), 1.0)
    assert not list(machine.events()), "it is said once"
    look_again(machine, 2.0)
    assert isinstance(*machine.events(), CheckDue)
    machine.checked(Observation({4: (True, "203.0.113.5")}), 2.0)
    assert list(machine.events()) == [Notice("others reach this node at 203.0.113.5:4000 now")] and not machine.doubt


@pytest.mark.parametrize(
    ("seen", "own", "kind"),
    [
        ([], "192.168.1.2", "unknown"),
        ([(OUTSIDE, 4000)], "192.168.1.2", "unknown"),
        ([(OUTSIDE, 4000)] * 2, "192.168.1.2", "keeping"),
        ([(OUTSIDE, 4000), (OUTSIDE, 4001)], "192.168.1.2", "symmetric"),
        ([(OUTSIDE, 4000)] * 2, OUTSIDE, "none"),
    ],
)
def test_two_observers_tell_the_kind_of_nat(seen: list[tuple[str, int]], own: str, kind: NatKind) -> None:
    assert kind_of_nat(seen, [own]) == kind


def test_the_role_follows_from_what_was_found() -> None:
    assert Reachability().role == "unknown"
    assert Reachability(tcp=True).role == "public"
    assert Reachability(tcp=True, udp=True).role == "public"
    assert Reachability(tcp=True, udp=False).role == "client"
    assert Reachability(tcp=False, udp=True).role == "client"


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Reachability(), "No other node"),
        (Reachability(tcp=True, udp=True, host="203.0.113.5"), "203.0.113.5:31337"),
        (Reachability(tcp=True, udp=False, host="203.0.113.5"), "UDP port 31337"),
        (Reachability(tcp=False, nat="keeping", host="203.0.113.5"), "holes can be punched"),
        (Reachability(tcp=False, nat="symmetric", host="203.0.113.5"), "relay"),
        (Reachability(tcp=False, nat="none", host="203.0.113.5"), "firewall"),
        (Reachability(tcp=False), "forward TCP and UDP port 31337"),
    ],
)
def test_the_user_is_told_what_to_do(found: Reachability, words: str) -> None:
    assert words in " ".join(found.sentences(31337))
