"""Limits the addresses that a node may send to on a stranger's word. Pure.

Contacts in replies, addresses in manifests, rendezvous nodes, relays and ICE candidates all name addresses, and naming
an address makes others send there. So a node on public addresses sends to public ones only, a node in a private network
also to those of the same kind of network, and only a node on loopback to loopback. Addresses that the user typed do
not count as a stranger's.
"""

import ipaddress
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from tesseract_async.transport.base import split_host_port

PUBLIC: Final = "public"
LOOPBACK: Final = "loopback"
LABORATORY: Final = "laboratory"


def _networks(*texts: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(map(ipaddress.ip_network, texts))


# Networks whose addresses mean something inside of them only.
_PRIVATE: Final = _networks("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
# Documentation and benchmark ranges: laboratories use them for an internet of their own; elsewhere nobody has an
# address there.
_LABORATORY: Final = _networks(
    *("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "198.18.0.0/15", "2001:db8::/32", "3fff::/20")
)
# Unspecified, multicast, reserved, or of one link (169.254.169.254 hands out a cloud machine's secrets).
_NEVER: Final = _networks(
    *("0.0.0.0/8", "169.254.0.0/16", "192.0.0.0/24", "192.88.99.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    "2001::/23",  # Teredo, ORCHID, benchmarks: what is inside cannot be seen or is no host
)
_UNICAST_V6: Final = ipaddress.ip_network("2000::/3")
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")


@lru_cache(maxsize=4096)
def kind_of(host: str) -> str | None:
    """`PUBLIC`, `LOOPBACK`, `LABORATORY`, or the private network's prefix such as ``10.0.0.0/8``, for a numeric host.

    None for what nobody may be sent to on a stranger's word: multicast, unspecified, link-local and reserved
    addresses, IPv6 forms that wrap anything but a public IPv4 address, addresses with a zone, and names.
    """
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return None
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.scope_id is not None:
            return None
        if ip.ipv4_mapped is not None:
            return kind_of(str(ip.ipv4_mapped))
        inner = ipaddress.IPv4Address(ip.packed[12:]) if ip in _NAT64 else ip.sixtofour
        if inner is not None:
            return PUBLIC if kind_of(str(inner)) == PUBLIC else None
    if ip.is_loopback:
        return LOOPBACK
    private = next((str(network) for network in _PRIVATE if ip in network), None)
    if private is not None:
        return private
    if any(ip in network for network in _LABORATORY):
        return LABORATORY
    if any(ip in network for network in _NEVER) or (ip.version == 6 and ip not in _UNICAST_V6):
        return None
    return PUBLIC


def is_near(host: str) -> bool:
    return kind_of(host) in (LOOPBACK, *map(str, _PRIVATE))


class AddressScope:
    """The addresses that one node may send to, shared by all its parts: at first public ones alone."""

    def __init__(self, own: Iterable[str] = ()) -> None:
        self._kinds: frozenset[str] = frozenset()
        self._enclosed: frozenset[int] = frozenset()
        self.set_own(own)

    def set_own(self, own: Iterable[str], *, seeds: Iterable[str] = ()) -> None:
        """Say where the node lives: the numeric hosts that it has, and those its user gave as seeds.

        A public address excludes the private networks of its version of IP. Seeds extend a private node's scope (the
        user says that there is a way), but never to loopback, and never a public node's.
        """
        kinds: set[str | None] = {PUBLIC}
        enclosed: set[int] = set()
        hosts, seeds = list(own), list(seeds)
        for version in (4, 6):
            here = {kind_of(host) for host in hosts if _version(host) == version}
            if here and PUBLIC not in here:
                enclosed.add(version)
                kinds |= here | {kind_of(host) for host in seeds if _version(host) == version} - {LOOPBACK}
        self._kinds = frozenset(kind for kind in kinds if kind is not None)
        self._enclosed = frozenset(enclosed)

    def allows(self, host: str) -> bool:
        """Return whether the numeric `host` may be sent to. False for a name: look it up first."""
        kind = kind_of(host)
        return kind == PUBLIC or kind in self._kinds

    def answers(self, host: str) -> bool:
        """Return whether a newcomer that wrote from `host` may be written to unasked.

        Nobody elsewhere can write from loopback, and a node that wrote from another private network has shown that
        there is a way to it.
        """
        kind = kind_of(host)
        return self.allows(host) or kind == LOOPBACK or (kind is not None and _version(host) in self._enclosed)

    def allowed(self, addresses: Iterable[str]) -> tuple[str, ...]:
        """Return those of the ``host:port`` that may be dialed, names among them: these are looked up first."""
        hosts = ((text, split_host_port(text)[0]) for text in addresses)
        return tuple(text for text, host in hosts if self.allows(host) or _is_name(host))


def _version(host: str) -> int:
    return 6 if ":" in host and not host.startswith("::ffff:") else 4


def _is_name(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False
