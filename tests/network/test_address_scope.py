"""Addresses heard from strangers: who may send where."""

import pytest

from tesseract_async.network.address_scope import LOOPBACK, PUBLIC, AddressScope, kind_of

PUBLIC_HOSTS = ["8.8.8.8", "1.1.1.1", "100.63.0.1", "172.32.0.1", "2606:4700::1111", "2a00:1450::1"]
WRAPPED_PUBLIC = ["2002:808:808::1", "64:ff9b::808:808", "::ffff:8.8.8.8"]
NOWHERE = [
    *("0.0.0.0", "0.1.2.3", "224.0.0.1", "239.255.255.250", "255.255.255.255", "240.0.0.1", "169.254.169.254"),
    *("192.0.0.8", "192.88.99.1", "::", "ff02::1", "ff0e::1", "fe80::1", "fe80::1%eth0", "2606:4700::1%1", "fec0::1"),
    *("::127.0.0.1", "::10.0.0.1", "::ffff:0:10.0.0.1", "100::1", "64:ff9b:1::a00:1", "2001:0:1::1", "4000::1"),
    *("2002:a00:1::1", "2002:7f00:1::1", "2002:c0a8:101::", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b::a00:1"),
    *("::ffff:169.254.169.254", "::ffff:0.0.0.0", "::ffff:224.0.0.1"),
    *("localhost", "example.org", "127.1", "2130706433", "0x7f000001", "", "10.0.0.1 ", "１０.0.0.1"),
]
PRIVATE = ["10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "fd00::1", "::ffff:10.0.0.1", "203.0.113.5"]
LOCAL = ["127.0.0.1", "127.8.0.1", "::1", "::ffff:127.0.0.1"]


@pytest.mark.parametrize("host", PUBLIC_HOSTS + WRAPPED_PUBLIC)
def test_public_addresses_are_for_everybody(host: str) -> None:
    assert kind_of(host) == PUBLIC
    for own in ("8.8.4.4", "10.0.0.9", "127.0.0.1", "fd00::9"):
        assert AddressScope([own]).allows(host)


@pytest.mark.parametrize("host", NOWHERE)
def test_some_addresses_are_for_nobody(host: str) -> None:
    assert kind_of(host) is None
    everywhere = [*PRIVATE, *LOCAL, host]
    assert not AddressScope(everywhere).allows(host)
    scope = AddressScope(["10.0.0.9"])
    scope.set_own(["10.0.0.9", "fd00::9"], seeds=[host])
    assert not scope.allows(host)


@pytest.mark.parametrize("host", PRIVATE + LOCAL)
def test_a_public_node_sends_to_no_private_address(host: str) -> None:
    scope = AddressScope()
    scope.set_own(["8.8.4.4", "2606:4700::9", "10.0.0.9", "fd00::9", "127.0.0.1", "::1"], seeds=[host])
    assert not scope.allows(host)
    assert not AddressScope().allows(host)


@pytest.mark.parametrize("host", PRIVATE)
def test_a_private_network_is_of_one_kind(host: str) -> None:
    own = kind_of(host)
    scope = AddressScope([host])
    assert [other for other in PRIVATE if scope.allows(other)] == [other for other in PRIVATE if kind_of(other) == own]
    assert not any(map(scope.allows, LOCAL))


def test_loopback_is_for_nodes_on_loopback() -> None:
    scope = AddressScope(["127.0.0.1"])
    assert all(map(scope.allows, LOCAL)) and not any(map(scope.allows, PRIVATE))
    assert kind_of("::1") == LOOPBACK


def test_a_global_ipv6_address_leaves_the_home_network_alone() -> None:
    scope = AddressScope(["192.168.1.7", "2a00:1450::7"])
    assert scope.allows("192.168.1.8") and not scope.allows("fd00::8") and not scope.allows("10.0.0.1")


def test_seeds_extend_a_private_network_but_not_to_loopback() -> None:
    scope = AddressScope()
    scope.set_own(["192.168.1.7"], seeds=["10.1.2.3", "127.0.0.1", "fd00::1"])
    assert scope.allows("10.9.9.9") and not scope.allows("127.0.0.1")
    assert not scope.allows("fd00::1"), "there is no way by IPv6"


def test_a_new_place_replaces_the_old_one() -> None:
    scope = AddressScope(["192.168.1.7"])
    scope.set_own(["10.0.0.7"])
    assert scope.allows("10.0.0.8") and not scope.allows("192.168.1.8")


def test_names_are_asked_about_once_they_are_looked_up() -> None:
    scope = AddressScope(["8.8.4.4"])
    addresses = ("8.8.8.8:1", "10.0.0.1:1", "example.org:1", "[2606:4700::1]:1", "[fd00::1]:1", "[::ffff:10.0.0.1]:1")
    assert scope.allowed(addresses) == ("8.8.8.8:1", "example.org:1", "[2606:4700::1]:1")
