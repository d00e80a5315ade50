"""A laboratory of real NATs: network namespaces of this kernel, joined by a bridge that plays the internet.

Public hosts sit on the bridge with an address of 203.0.113.0/24 (RFC 5737). A host behind a NAT sits alone in a private
network, whose router masquerades:

- ``"keeping"``: the router keeps the port that the host used, whomever it talks to: holes can be punched;
- ``"symmetric"``: it takes a new random port for each destination: holes cannot be punched.

Routers drop new inbound packets, as home routers do. Without that rule an early packet from the other side makes Linux
itself choose another port, and the keeping NAT would not keep.

Needs root, iproute2 and nftables (and conntrack for `Lab.forget_mappings`); `why_not` says what is missing.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from types import TracebackType
from typing import Self

_numbers = itertools.count()

NAT_RULES = {"keeping": "masquerade", "symmetric": "masquerade random,fully-random"}


@dataclass(frozen=True, slots=True)
class Host:
    """A computer in the laboratory."""

    name: str
    kind: str
    """``"public"``, ``"keeping"`` or ``"symmetric"``."""
    address: str
    """Its own address."""
    outside: str
    """The address under which the internet sees it."""


def why_not() -> str | None:
    """Why the laboratory can't be built on this machine, or None if it can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "nft", "conntrack"):
        if shutil.which(tool, path=_path()) is None:
            return f"{tool} is not installed (Debian: iproute2, nftables, conntrack)"
    try:
        with Lab({"x": "keeping"}):
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"this machine refuses to make a NAT: {error}"


class Lab:
    """`hosts`: names and kinds. Build it as a context manager; leaving it removes every namespace again."""

    def __init__(self, hosts: dict[str, str]) -> None:
        self._kinds = hosts
        self._prefix = f"tsr{os.getpid()}x{next(_numbers)}"
        self._namespaces: list[str] = []
        self.hosts: dict[str, Host] = {}

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove()

    def command(self, host: str, *args: str) -> list[str]:
        """`args` as a command that runs on `host`."""
        return ["ip", "netns", "exec", self.namespace(host), *args]

    def namespace(self, host: str) -> str:
        """The name of the network namespace that is `host`."""
        return f"{self._prefix}-{host}"

    def forget_mappings(self, host: str) -> None:
        """The router of `host` forgets all its connections, as after a restart."""
        _run(*self.command(f"{host}-nat", "conntrack", "-F"))

    def block_udp(self, host: str, *, blocked: bool, but: int) -> None:
        """The router of `host` lets no UDP pass except to port `but`, as some firewalls; or it does so again."""
        if not blocked:
            self._in(f"{host}-nat", "nft delete table ip noudp")
            return
        rules = f"""
            table ip noudp {{
                chain passing {{
                    type filter hook forward priority -1; policy accept;
                    udp dport != {but} drop
                }}
            }}
        """
        _run(*self.command(f"{host}-nat", "nft", "-f", "-"), text=rules)

    def _build(self) -> None:
        self._add_namespace("net")
        self._in("net", "ip link add br0 type bridge")
        self._in("net", "ip link set br0 up")
        for number, (name, kind) in enumerate(self._kinds.items(), start=1):
            outside = f"203.0.113.{number}"
            self._add_namespace(name)
            if kind == "public":
                self._join_bridge(name, number, outside)
                self.hosts[name] = Host(name, kind, outside, outside)
            else:
                own = f"10.0.{number}.2"
                self._add_router(name, number, kind, outside)
                self.hosts[name] = Host(name, kind, own, outside)

    def _add_router(self, name: str, number: int, kind: str, outside: str) -> None:
        router = f"{name}-nat"
        self._add_namespace(router)
        self._join_bridge(router, number, outside)
        self._in(router, f"ip link add lan type veth peer name eth0 netns {self.namespace(name)}")
        self._in(router, f"ip addr add 10.0.{number}.1/24 dev lan")
        self._in(router, "ip link set lan up")
        self._in(name, f"ip addr add 10.0.{number}.2/24 dev eth0")
        self._in(name, "ip link set eth0 up")
        self._in(name, f"ip route add default via 10.0.{number}.1")
        self._in(router, "sysctl -qw net.ipv4.ip_forward=1")
        rules = f"""
            table ip nat {{
                chain outward {{ type nat hook postrouting priority 100; oifname wan {NAT_RULES[kind]}; }}
            }}
            table ip guard {{
                chain passing {{
                    type filter hook forward priority 0; policy drop;
                    iifname lan accept
                    ct state established,related accept
                }}
                chain inbound {{ type filter hook input priority 0; policy accept; iifname wan ct state new drop; }}
            }}
        """
        _run(*self.command(router, "nft", "-f", "-"), text=rules)

    def _join_bridge(self, name: str, number: int, address: str) -> None:
        self._in("net", f"ip link add p{number} type veth peer name wan netns {self.namespace(name)}")
        self._in("net", f"ip link set p{number} master br0 up")
        self._in(name, f"ip addr add {address}/24 dev wan")
        self._in(name, "ip link set wan up")

    def _add_namespace(self, name: str) -> None:
        namespace = self.namespace(name)
        _run("ip", "netns", "add", namespace)
        self._namespaces.append(namespace)
        self._in(name, "ip link set lo up")

    def _in(self, name: str, command: str) -> None:
        _run(*self.command(name, *command.split()))

    def _remove(self) -> None:
        for namespace in self._namespaces:
            subprocess.run(["ip", "netns", "del", namespace], check=False, env={**os.environ, "PATH": _path()})
        self._namespaces.clear()


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _run(*args: str, text: str | None = None) -> None:
    subprocess.run(args, check=True, input=text, text=True, capture_output=True, env={**os.environ, "PATH": _path()})
