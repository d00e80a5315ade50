"""The addresses of this computer, without those of its containers and virtual machines only, and sockets there."""

import asyncio
import contextlib
import errno
import ipaddress
import socket
from collections.abc import Sequence
from typing import Final

from tesseract_async.nat.role import WILDCARDS

VIRTUAL_INTERFACES: Final = tuple(
    "lo docker br- virbr veth vmnet vboxnet vnet lxc lxd cni flannel cali kube podman dummy ifb "
    "vEthernet VirtualBox VMware Hyper-V".split()
)
"""Beginnings of names of interfaces that no other computer can reach."""
MAX_ADDRESSES: Final = 8
NUM_PORT_TRIES: Final = 32
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


def hosts_to_announce(host: str, family: int, seeds: Sequence[tuple[str, int]]) -> list[str]:
    """Return the addresses that others see: `host`, or for a wildcard those of the interfaces towards the seeds.

    Raises: ValueError if there is none.
    """
    if host not in WILDCARDS:
        return [host]
    families = (socket.AF_INET, socket.AF_INET6) if family == socket.AF_INET6 else (socket.AF_INET,)
    found = [own for one in families if (own := address_towards(one, seeds)) is not None]
    if not found:
        raise ValueError(f"listening on {host} does not tell others where to dial: say announce='host:port'")
    return found


async def bind_pair(host: str, port: int) -> tuple[socket.socket, socket.socket]:
    """Return a listening TCP socket and a UDP socket that share one port number; with port 0 the pair is retried.

    Raises: OSError with a sentence.
    """
    if not host:  # everything that this machine has
        host = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise OSError(error.errno, f"cannot listen on {host!r}: it is no address of this machine") from None
    family, _, _, _, address = found[0]
    both = address[0] == "::" and socket.has_dualstack_ipv6()
    for _ in range(NUM_PORT_TRIES if port == 0 else 1):
        with contextlib.ExitStack() as stack:
            tcp = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            udp = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            for sock in (tcp, udp):
                sock.setblocking(False)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)
            if hasattr(socket, "SO_REUSEPORT"):  # POSIX: a port in TIME_WAIT is free; on Windows the option means theft
                tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tcp.bind(address)
                tcp.listen(1024)
                udp.bind((address[0], tcp.getsockname()[1], *address[2:]))
            except OSError as error:
                if error.errno != errno.EADDRINUSE or port != 0:
                    raise _bind_error(error, host, port) from None
            else:
                stack.pop_all()
                return tcp, udp
    raise OSError(errno.EADDRINUSE, f"no port on {host} is free for both UDP and TCP")


def _bind_error(error: OSError, host: str, port: int) -> OSError:
    sentences = {
        errno.EADDRINUSE: f"port {port} on {host} is in use: choose another one, or 0 for any that is free",
        errno.EADDRNOTAVAIL: f"cannot listen on {host}: it is no address of this machine",
        errno.EACCES: f"may not listen on port {port}: ports below 1024 need privileges",
    }
    return OSError(error.errno, sentences[error.errno]) if error.errno in sentences else error
