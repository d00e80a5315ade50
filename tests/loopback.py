"""What of IPv6 there is on this computer. Containers often have its sockets, but no address for them, not even ::1."""

import socket

import pytest


def _can_bind(host: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind((host, 0))
    except OSError:
        return False
    return True


needs_ipv6_loopback = pytest.mark.skipif(not _can_bind("::1"), reason="this machine has no ::1")
needs_both_kinds_of_ip = pytest.mark.skipif(
    not (_can_bind("::") and socket.has_dualstack_ipv6()), reason="this machine has no sockets for both kinds of IP"
)
