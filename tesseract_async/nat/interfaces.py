"""The addresses of this computer, without those that lead to its containers and virtual machines only."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from typing import Final

VIRTUAL_INTERFACES: Final = tuple(
    "lo docker br- virbr veth vmnet vboxnet vnet lxc lxd cni flannel cali kube podman dummy ifb "
    "vEthernet VirtualBox VMware Hyper-V".split()
)
"""Beginnings of names of interfaces that no other computer can reach."""
MAX_ADDRESSES: Final = 8
ELSEWHERE: Final = {socket.AF_INET: ("192.0.2.1", 9), socket.AF_INET6: ("2001:db8::1", 9)}
"""Addresses for documentation (RFC 5737, RFC 3849): they never answer, but the default route leads to them."""


def own_addresses() -> list[str]:
    """Return the addresses that a peer might reach, IPv4 first: none of loopback or of one link only."""
    import ifaddr  # comes with aiortc

    found: list[str] = []
    for adapter in ifaddr.get_adapters():
        if str(adapter.nice_name).startswith(VIRTUAL_INTERFACES):
            continue
        for ip in adapter.ips:
            text = ip.ip if isinstance(ip.ip, str) else ip.ip[0]
            parsed = ipaddress.ip_address(text)
            if not (parsed.is_loopback or parsed.is_link_local or parsed.is_unspecified) and text not in found:
                found.append(text)
    return sorted(found, key=lambda text: ":" in text)[:MAX_ADDRESSES]


def address_towards(family: socket.AddressFamily, targets: Sequence[tuple[str, int]] = ()) -> str | None:
    """Return the address from which this computer would send to the first of `targets` that a route leads to, else to
    the internet. Nothing is sent: connecting a UDP socket only asks the routing table. None without any route."""
    for target in (*targets, ELSEWHERE[family]):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(target)
            except OSError:
                continue
            host = str(probe.getsockname()[0])
        if not ipaddress.ip_address(host).is_link_local:
            return host
    return None
