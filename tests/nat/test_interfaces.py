from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tesseract_async.nat.interfaces import own_addresses


@dataclass
class Ip:
    ip: Any


@dataclass
class Adapter:
    nice_name: str
    ips: list[Ip]


Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Gives the computer these network adapters."""

    def make(**adapters: list[Any]) -> None:
        made = [Adapter(name.replace("_", "-"), [Ip(ip) for ip in ips]) for name, ips in adapters.items()]
        monkeypatch.setattr("ifaddr.get_adapters", lambda: made)

    return make


def test_virtual_interfaces_and_useless_addresses_are_left_out(machine: Machine) -> None:
    machine(
        lo=["127.0.0.1", ("::1", 0, 0)],
        docker0=["172.17.0.1"],
        br_4f2a=["172.18.0.1"],
        veth12=["10.1.0.1"],
        vboxnet0=["192.168.56.1"],
        eth0=[("2001:db8::7", 0, 0), ("fe80::1", 0, 2), "192.168.1.5"],
        wlan0=["192.168.1.6", "169.254.3.3", "0.0.0.0", "192.168.1.5"],
    )
    assert own_addresses() == ["192.168.1.5", "192.168.1.6", "2001:db8::7"]


def test_there_may_be_many(machine: Machine) -> None:
    machine(eth0=[f"10.0.0.{number}" for number in range(1, 50)])
    assert len(own_addresses()) == 8
