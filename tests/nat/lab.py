"""A laboratory of real NATs: network namespaces of this kernel, joined by a bridge that plays the internet.

Public hosts sit on the bridge with an address of 203.0.113.0/24 (RFC 5737). A host behind a NAT sits alone in a private
network, whose router masquerades:

- ``"keeping"``: the router keeps the port that the host used, whatever host it talks to: holes can be punched;
- ``"symmetric"``: it takes a new random port for each destination: holes cannot be punched.

Further words of a host's kind: ``"v6"`` gives it (and its router) IPv6 as well, from 2001:db8::/32 (RFC 3849), without
NAT; ``"open6"`` too, and the router lets IPv6 in at the nodes' port; ``"only6"`` is a public host with IPv6 alone;
``"upnp"`` has the router map ports for those who ask (Debian's miniupnpd). A ``"machine"`` is a public host without a
node.

Routers drop new inbound packets, as home routers do. Without that rule an early packet from the other side makes Linux
itself choose another port, and the keeping NAT would not keep.

Needs root, iproute2 and nftables (conntrack for `Lab.forget_mappings`, miniupnpd for ``"upnp"``); `why_not` says what
is missing.
"""

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from types import TracebackType
from typing import Self

_numbers = itertools.count()

PORT = 31337
"""Where the nodes of the laboratory listen."""
PACKAGES = {"miniupnpd": "miniupnpd-nftables"}
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
    v6: str = ""
    """Its IPv6 address, if it has one."""


def why_not(*more: str) -> str | None:
    """Why the laboratory can't be built on this machine, or None if it can. `more`: tools that a test needs, too."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "nft", "conntrack"):
        if shutil.which(tool, path=_path()) is None:
            return f"{tool} is not installed (Debian: iproute2, nftables, conntrack)"
    for tool in more:
        if shutil.which(tool, path=_path()) is None:
            return f"{tool} is not installed (Debian: {PACKAGES.get(tool, tool)})"
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
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._folder = ""
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

    def is_only_v6(self, host: str) -> bool:
        """Whether `host` has no IPv4."""
        return self._kinds[host].startswith("only6")

    def forget_mappings(self, host: str) -> None:
        """The router of `host` forgets all its connections, as after a restart."""
        _run(*self.command(f"{host}-nat", "conntrack", "-F"))

    def lose(self, host: str, percent: int) -> None:
        """The way between `host` and its router drops so many of a hundred UDP packets each way from now on."""
        rules = f"""
            table ip bad {{
                chain passing {{
                    type filter hook forward priority -2; policy accept;
                    meta l4proto udp numgen random mod 100 < {percent} drop
                }}
            }}
        """
        _run(*self.command(f"{host}-nat", "nft", "-f", "-"), text=rules)

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

    def forward(self, host: str) -> None:
        """The router of `host` forwards the nodes' port to it from now on, as its owner may have told it to."""
        place = self.hosts[host]
        rules = f"""
            table ip forwarded {{
                chain inward {{
                    type nat hook prerouting priority -100;
                    ip daddr {place.outside} tcp dport {PORT} dnat to {place.address}
                    ip daddr {place.outside} udp dport {PORT} dnat to {place.address}
                }}
            }}
            insert rule ip guard passing ct status dnat accept
        """
        _run(*self.command(f"{host}-nat", "nft", "-f", "-"), text=rules)

    def mapped_ports(self, host: str) -> int:
        """How many port mappings the UPnP router of `host` holds."""
        listed = subprocess.run(
            self.command(f"{host}-nat", "nft", "list", "table", "inet", "miniupnpd"),
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": _path()},
        )
        return listed.stdout.count("dnat ip to")

    def start_daemon(self, namespace_of: str, *args: str) -> None:
        """Runs a program on a host or router until the laboratory is left."""
        self._daemons.append(
            subprocess.Popen(
                self.command(namespace_of, *args),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PATH": _path()},
            )
        )

    def write(self, name: str, text: str) -> str:
        """A file for a daemon, removed with the laboratory: its path."""
        self._folder = self._folder or tempfile.mkdtemp(prefix="lab-")
        path = os.path.join(self._folder, name)
        with open(path, "w") as handle:
            handle.write(text)
        return path

    def _build(self) -> None:
        self._add_namespace("net")
        self._in("net", "ip link add br0 type bridge")
        self._in("net", "ip link set br0 up")
        for number, (name, words) in enumerate(self._kinds.items(), start=1):
            kind, *more = words.split()
            outside, own = f"203.0.113.{number}", f"10.0.{number}.2"
            has_v6 = bool({"v6", "open6", "only6"} & {kind, *more})
            self._add_namespace(name)
            if kind in ("public", "only6", "machine"):
                self._join_bridge(name, number, outside if kind != "only6" else "", v6=has_v6)
                v6 = f"2001:db8::{number:x}" if has_v6 else ""
                if kind == "machine":  # as the internet has it: what is sent to nowhere is no error at the sender
                    self._in(name, "ip route add default dev wan")
                self.hosts[name] = Host(name, "machine" if kind == "machine" else "public", outside, outside, v6)
                continue
            self._add_router(name, number, kind, outside, v6=has_v6)
            self.hosts[name] = Host(name, kind, own, outside, f"2001:db8:{number:x}::2" if has_v6 else "")
            if has_v6:
                self._add_v6(name, number, pinhole="open6" in more)
            if "upnp" in more:
                self._add_upnp(name)
        self._add_v6_routes()

    def _add_router(self, name: str, number: int, kind: str, outside: str, *, v6: bool) -> None:
        router = f"{name}-nat"
        self._add_namespace(router)
        self._join_bridge(router, number, outside, v6=v6)
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

    def _add_v6(self, name: str, number: int, *, pinhole: bool) -> None:
        """IPv6 behind the router: no NAT, but nobody gets in unasked, except at the nodes' port by a pinhole."""
        router = f"{name}-nat"
        self._in(router, f"ip -6 addr add 2001:db8:{number:x}::1/64 dev lan nodad")
        self._in(name, f"ip -6 addr add 2001:db8:{number:x}::2/64 dev eth0 nodad")
        self._in(name, f"ip -6 route add default via 2001:db8:{number:x}::1")
        self._in(router, "sysctl -qw net.ipv6.conf.all.forwarding=1")
        hole = f"meta l4proto {{ tcp, udp }} th dport {PORT} accept" if pinhole else ""
        rules = f"""
            table ip6 guard {{
                chain passing {{
                    type filter hook forward priority 0; policy drop;
                    iifname lan accept
                    ct state established,related accept
                    {hole}
                }}
            }}
        """
        _run(*self.command(router, "nft", "-f", "-"), text=rules)

    def _add_v6_routes(self) -> None:
        """Everybody on the bridge knows which router leads to which network."""
        numbers = {name: number for number, name in enumerate(self._kinds, start=1)}
        behind = [name for name, host in self.hosts.items() if host.v6 and host.kind != "public"]
        for place, host in self.hosts.items():
            if host.v6:
                on_bridge = place if host.kind == "public" else f"{place}-nat"
                for name in behind:
                    if name != place:
                        number = numbers[name]
                        self._in(on_bridge, f"ip -6 route add 2001:db8:{number:x}::/64 via 2001:db8::{number:x}")

    def _add_upnp(self, name: str) -> None:
        """The router maps ports for all that ask from inside."""
        router = f"{name}-nat"
        rules = """
            table inet miniupnpd {
                chain miniupnpd { }
                chain prerouting_miniupnpd { }
                chain postrouting_miniupnpd { }
                chain forward { type filter hook forward priority 0; jump miniupnpd; }
                chain prerouting { type nat hook prerouting priority -100; jump prerouting_miniupnpd; }
            }
            insert rule ip guard passing ct status dnat accept
        """
        _run(*self.command(router, "nft", "-f", "-"), text=rules)
        settings = self.write(
            f"{name}.conf",
            # it refuses to serve with an address of its own that is none of the internet's: it is told another one
            "ext_ifname=wan\next_ip=11.22.33.44\nlistening_ip=lan\nport=5000\nenable_upnp=yes\nsecure_mode=yes\n"
            "uuid=00000000-0000-0000-0000-000000000001\nupnp_table_name=miniupnpd\nupnp_nat_table_name=miniupnpd\n"
            "upnp_forward_chain=miniupnpd\nupnp_nat_chain=prerouting_miniupnpd\n"
            "upnp_nat_postrouting_chain=postrouting_miniupnpd\nallow 1024-65535 0.0.0.0/0 1024-65535\n",
        )
        self.start_daemon(router, "miniupnpd", "-d", "-f", settings, "-P", settings + ".pid")

    def _join_bridge(self, name: str, number: int, address: str, *, v6: bool) -> None:
        self._in("net", f"ip link add p{number} type veth peer name wan netns {self.namespace(name)}")
        self._in("net", f"ip link set p{number} master br0 up")
        if address:
            self._in(name, f"ip addr add {address}/24 dev wan")
        self._in(name, "ip link set wan up")
        if v6:
            self._in(name, f"ip -6 addr add 2001:db8::{number:x}/64 dev wan nodad")

    def _add_namespace(self, name: str) -> None:
        namespace = self.namespace(name)
        _run("ip", "netns", "add", namespace)
        self._namespaces.append(namespace)
        self._in(name, "ip link set lo up")

    def _in(self, name: str, command: str) -> None:
        _run(*self.command(name, *command.split()))

    def _remove(self) -> None:
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()
        self._daemons.clear()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
        for namespace in self._namespaces:
            subprocess.run(["ip", "netns", "del", namespace], check=False, env={**os.environ, "PATH": _path()})
        self._namespaces.clear()


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _run(*args: str, text: str | None = None) -> None:
    subprocess.run(args, check=True, input=text, text=True, capture_output=True, env={**os.environ, "PATH": _path()})
