"""Where a node listens, and under which addresses others find it. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tesseract_async.transport.base import join_host_port, split_host_port

WILDCARDS: Final = ("0.0.0.0", "::", "")


@dataclass(frozen=True, slots=True)
class ListeningAddress:
    """What a node's sockets are bound to, and what it announces."""

    host: str
    port: int
    announced: tuple[str, ...]
    """``host:port`` that others should dial, as far as the node or its user knows."""
    versions: tuple[int, ...]
    """Versions of IP that the sockets speak: 4, 6 or both."""

    @property
    def is_wildcard(self) -> bool:
        """Whether the sockets listen on every interface."""
        return self.host in WILDCARDS

    @property
    def is_loopback(self) -> bool:
        """Whether only this computer can reach the sockets."""
        return not self.is_wildcard and ipaddress.ip_address(self.host).is_loopback

    def at(self, hosts: Sequence[str], *, mapped_port: int | None) -> tuple[str, ...]:
        """Return these hosts as ``host:port``. `mapped_port`: the router's IPv4 port that leads here, if any."""
        return tuple(join_host_port(host, self.port if ":" in host else mapped_port or self.port) for host in hosts)

    def announced_besides(self, opened: Sequence[str], closed_hosts: Sequence[str]) -> tuple[str, ...]:
        """Return where a public node is dialed: addresses in `opened`, at which it was dialed although it did not
        announce their hosts, then what it announced, without the hosts at which it could not be dialed."""
        known = {split_host_port(text)[0] for text in self.announced}
        news = [text for text in opened if split_host_port(text)[0] not in known]
        left = [text for text in self.announced if split_host_port(text)[0] not in closed_hosts]
        return tuple(dict.fromkeys((*news, *left)))
