"""This computer's own addresses, without those that lead to its containers and virtual machines only."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Final

VIRTUAL_INTERFACES: Final = (
    *(
        "lo",
        "docker",
        "br-",
        "virbr",
        "veth",
        "vmnet",
        "vboxnet",
        "vnet",
        "lxc",
        "lxd",
        "cni",
        "flannel",
        "cali",
        "kube",
    ),
    *("podman", "vEthernet", "VirtualBox", "VMware", "Hyper-V", "dummy", "ifb"),
)
"""Beginnings of names of interfaces that no other computer can reach."""


def own_addresses(skip: Sequence[str] = VIRTUAL_INTERFACES, *, most: int = 8) -> list[str]:
    """Addresses that a peer might reach, IPv4 first: at most `most`, none of loopback or one link only.

    `skip`: beginnings of names of interfaces that are left out.
    """
    import ifaddr  # comes with aiortc

    found: list[str] = []
    for adapter in ifaddr.get_adapters():
        if any(str(adapter.nice_name).startswith(name) for name in skip):
            continue
        for ip in adapter.ips:
            text = ip.ip if isinstance(ip.ip, str) else ip.ip[0]
            parsed = ipaddress.ip_address(text)
            if not (parsed.is_loopback or parsed.is_link_local or parsed.is_unspecified) and text not in found:
                found.append(text)
    return sorted(found, key=lambda text: ":" in text)[:most]
