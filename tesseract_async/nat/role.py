"""The role of a node in the network: *public*, or a *client* of public nodes. Pure.

`RoleMachine` is told what helpers, STUN servers and the DHT saw of this node; from that it decides the role, and when
to look again. Its driver is `reach`.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from tesseract_async.transport.base import ip_version, is_loopback, join_host_port, split_host_port

CHECK_PERIOD: Final = 600.0
"""Seconds after which a node whose role is known finds out anew whether it can be reached."""
WATCH_PERIOD: Final = 5.0
"""Seconds between looks at the addresses of this computer, and between checks while nobody could be asked."""

WILDCARDS: Final = ("0.0.0.0", "::", "")

NodeRole = Literal["unknown", "client", "public"]
NatKind = Literal["unknown", "none", "keeping", "symmetric"]
"""``keeping``: the NAT keeps ports, holes can be punched; ``symmetric``: most likely they cannot."""


@dataclass(frozen=True, slots=True)
class ListeningAddress:
    """The address that a node's sockets are bound to, and those that it announces."""

    host: str
    port: int
    announced: tuple[str, ...]
    """``host:port`` that others should dial, as far as the node or its user knows."""
    versions: tuple[int, ...]
    """Versions of IP that the sockets speak: 4, 6 or both."""

    @property
    def is_wildcard(self) -> bool:
        return self.host in WILDCARDS

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.host)


@dataclass(frozen=True, slots=True)
class Reachability:
    """The ways in which others reach a node, as far as it knows."""

    tcp: bool | None = None
    """True if others can dial it; None if there was nobody to try."""
    udp: bool | None = None
    """True if the DHT's socket was reached by nodes that it had not contacted."""
    host: str | None = None
    """The node's address, as others see it."""
    nat: NatKind = "unknown"
    open_hosts: tuple[str, ...] = ()
    """The node's addresses at which others have dialed it: at most one of IPv4 and one of IPv6."""
    closed_hosts: tuple[str, ...] = ()
    """The node's addresses, as others see them, at which they could not dial it."""

    @property
    def role(self) -> NodeRole:
        """``public``: serves the DHT and is a rendezvous; ``client``: uses them."""
        if self.tcp is False or self.udp is False:
            return "client"
        return "public" if self.tcp else "unknown"

    def sentences(self, port: int) -> list[str]:
        where = join_host_port(self.host, port) if self.host else f"port {port}"
        v6 = [join_host_port(host, port) for host in self.open_hosts if ":" in host and host != self.host]
        closed_v6 = [host for host in self.closed_hosts if ":" in host and host != self.host]
        if self.tcp is None:
            return ["No other node has tried yet whether this one can be reached."]
        if self.tcp:
            lines = [f"Others reach this node at {' and '.join([where, *v6])}: it takes full part in the network."]
            if self.udp is False:
                lines = [
                    f"Others reach this node at {where} by TCP, but not by UDP: it serves experts and holds no keys.",
                    f"To take full part, let UDP port {port} through, too.",
                ]
            if closed_v6:
                lines.append(
                    f"By IPv6 ({closed_v6[0]}) it is not reached: open the firewall for port {port} there, too."
                )
            return lines
        found = {
            "none": f"A firewall keeps others from dialing this node (seen as {self.host}).",
            "keeping": f"This node is behind a NAT that keeps ports (seen as {self.host}): holes can be punched.",
            "symmetric": f"This node is behind a symmetric NAT (seen as {self.host}): most peers need a relay.",
            "unknown": f"Others cannot dial this node (seen as {self.host or 'nothing'}).",
        }[self.nat]
        return [
            found,
            *(f"Peers that have IPv6 dial it directly at {address}." for address in v6[:1]),
            f"To be dialed directly, forward TCP and UDP port {port} in the router to this computer, or open the "
            f"firewall for it, and start the node with that port. Many routers do so if the node asks (--upnp).",
        ]


def kind_of_nat(seen: Sequence[tuple[str, int]], own_hosts: Sequence[str]) -> NatKind:
    """Judge the NAT by where each STUN server saw one socket, and the addresses of this computer (RFC 5780)."""
    if not seen:
        return "unknown"
    if {host for host, _ in seen} <= set(own_hosts):
        return "none"
    if len(seen) < 2:
        return "unknown"
    return "keeping" if len(set(seen)) == 1 else "symmetric"


@dataclass(frozen=True, slots=True)
class Observation:
    dialed: Mapping[int, tuple[bool, str]]
    """By version of IP, where a helper could be asked: whether this node was reached, and the host that helpers see."""
    nat: NatKind = "unknown"
    seen_host: str | None = None
    """This node's host as STUN servers see it."""
    udp: bool | None = None
    """True if the DHT was reached; None: unknown."""


@dataclass(frozen=True, slots=True)
class CheckDue:
    """Find out what others see of this node, and answer with `RoleMachine.checked`."""

    ports: Mapping[int, int]
    """Versions of IP by which helpers are asked to dial this node back, and the port that they should dial."""
    stun: bool
    """True if STUN servers are asked, too."""


@dataclass(frozen=True, slots=True)
class RoleFound:
    """The node serves others (or no longer) from now on; see `RoleMachine.reachability`."""

    became_client: bool
    is_news: bool
    """True if peers may reach this node in another way than before."""


@dataclass(frozen=True, slots=True)
class HostsChanged:
    """The news that this computer has other addresses than before."""


@dataclass(frozen=True, slots=True)
class MappingDoubted:
    """The router should be asked for its port mapping again."""


@dataclass(frozen=True, slots=True)
class Notice:
    text: str
    is_warning: bool = False


RoleEvent = CheckDue | RoleFound | HostsChanged | MappingDoubted | Notice


class RoleMachine:
    """See the module. After each call, act on `events` and call `handle_timer` at `timer_at`."""

    def __init__(
        self,
        address: ListeningAddress,
        *,
        is_declared_public: bool = False,
        is_declared_client: bool = False,
        check_all_versions: bool = False,
        watch_period: float = WATCH_PERIOD,
    ) -> None:
        """`is_declared_public`: the user says that others can dial this node; it stays public, checks only find out
        whether to contradict. `is_declared_client`: the user says that they cannot; helpers are not asked.
        `check_all_versions`: also by versions of IP of which this computer has no address (tests on loopback)."""
        self.address = address
        self.reachability = Reachability(tcp=True) if is_declared_public else Reachability()
        self.doubt = ""
        """The reason to think that the user was wrong to declare the node public; empty: there is none."""
        self.mapped_port: int | None = None
        """The router's port that leads to this node."""
        self._is_declared_public = is_declared_public
        self._is_declared_client = is_declared_client and not is_declared_public
        self._check_all_versions = check_all_versions
        self._watch_period = watch_period
        self._hosts: tuple[str, ...] = ()
        self._check_at: float | None = None
        self._watch_at = 0.0
        self._is_checking = False
        self._check_again = False
        self._events: deque[RoleEvent] = deque()
        if self._is_declared_client:
            self._take(Reachability(tcp=False))

    @property
    def outside_port(self) -> int:
        """The port by which others dial this node by IPv4: its own, or the router's that leads to it."""
        return self.mapped_port or self.address.port

    @property
    def public_addresses(self) -> tuple[str, ...]:
        """The addresses at which others can dial this node, if any: those at which it was dialed without announcing
        their hosts, then what it announced, without the hosts at which it could not be dialed."""
        hosts = self.reachability.open_hosts
        opened = tuple(join_host_port(host, self.address.port if ":" in host else self.outside_port) for host in hosts)
        if not self.reachability.tcp:
            return opened
        announced = {text: split_host_port(text)[0] for text in self.address.announced}
        news = [text for text in opened if split_host_port(text)[0] not in announced.values()]
        left = [text for text, host in announced.items() if host not in self.reachability.closed_hosts]
        return tuple(dict.fromkeys((*news, *left)))

    def told_addresses(self, *, has_rendezvous: bool) -> tuple[str, ...]:
        """Return the addresses for records: what was announced, unless dial-back says better. A client names addresses
        that do not work only while it has nothing else to name."""
        if self.reachability.tcp or (
            self.reachability.tcp is False and (has_rendezvous or self.reachability.open_hosts)
        ):
            return self.public_addresses
        return self.address.announced

    @property
    def behind_nat(self) -> bool:
        """Return whether there are peers that cannot dial this node: all, or those without IPv6."""
        return not self.reachability.tcp

    @property
    def symmetric(self) -> bool:
        return self.reachability.nat == "symmetric"

    def events(self) -> Iterator[RoleEvent]:
        while self._events:
            yield self._events.popleft()

    def timer_at(self) -> float | None:
        """Return when to call `handle_timer`; None: not before the check under way has ended."""
        if self._check_at is None or self._is_checking:
            return None
        return self._check_at if self._is_declared_public else min(self._check_at, self._watch_at)

    def joined(self, hosts: Sequence[str], now: float) -> None:
        """Make the first check: the network was joined. `hosts`: the addresses of this computer."""
        self._hosts = tuple(hosts)
        self._check_at = now
        self.handle_timer(hosts, now)

    def handle_timer(self, hosts: Sequence[str], now: float) -> None:
        """Watch for changes of `hosts`, the addresses of this computer, and check if it is time to."""
        if self._check_at is None or self._is_checking:
            return
        self._watch_at = now + self._watch_period
        if tuple(hosts) != self._hosts and not self._is_declared_public:
            self._hosts = tuple(hosts)
            self._events += (
                MappingDoubted(),
                Notice("this computer's addresses have changed: finding out anew what can be reached"),
                HostsChanged(),
            )
            self._check_at = now
        if now >= self._check_at:
            self._is_checking = True
            self._events.append(self._next_check())

    def look_again(self, now: float) -> None:
        """Check now, or as soon as the check under way has ended: something may have changed."""
        if self._is_checking:
            self._check_again = True
        elif self._check_at is not None:
            self._check_at = now

    def mapped(self, port: int | None, now: float) -> None:
        """Take note that the router's port that leads to this node has changed; None: there is none."""
        self.mapped_port = port
        self.look_again(now)

    def checked(self, found: Observation, now: float) -> None:
        """Take the result of the check that `CheckDue` asked for."""
        self._is_checking = False
        is_known = self._judge_claim(found) if self._is_declared_public else self._judge(found)
        wait = CHECK_PERIOD if is_known else self._watch_period
        self._check_at = now if self._check_again else now + wait
        self._check_again = False

    def _next_check(self) -> CheckDue:
        if self._is_declared_public:
            _, port = split_host_port(self.address.announced[0])
            version = ip_version(self.address.announced[0]) or self.address.versions[0]
            return CheckDue({version: port}, stun=False)
        if self._is_declared_client:
            return CheckDue({}, stun=True)
        own = {6 if ":" in host else 4 for host in self._hosts}
        versions = [one for one in self.address.versions if one in own or self._check_all_versions]
        return CheckDue({one: self.outside_port if one == 4 else self.address.port for one in versions}, stun=True)

    def _judge_claim(self, found: Observation) -> bool:
        for reached, host in found.dialed.values():
            announced = self.address.announced[0]
            dialed = join_host_port(host, split_host_port(announced)[1])
            elsewhere = "" if dialed == announced else f", as which others see it (it announces {announced})"
            doubt = (
                f"This node was started as public, but others that dialed {dialed}{elsewhere} did not get through: "
                f"let TCP and UDP to this port in, or start it without that claim, and it finds the other ways by "
                f"itself."
            )
            if not reached and not self.doubt:
                self._events.append(Notice(doubt, is_warning=True))
            elif reached and self.doubt:
                self._events.append(Notice(f"others reach this node at {dialed} now"))
            self.doubt = "" if reached else doubt
        return bool(found.dialed)

    def _judge(self, seen: Observation) -> bool:
        before = self.reachability
        # IPv4 decides where there is both: everybody has it, and the DHT's contacts name one address
        reached, host = seen.dialed.get(4) or seen.dialed.get(6) or (False if self._is_declared_client else None, None)
        if before.host is not None and ":" not in before.host and 4 not in seen.dialed:
            reached = None  # helpers that could have told are away: IPv6 alone says nothing of it
        found = Reachability(
            tcp=reached,
            udp=None if before.tcp is False else seen.udp,  # the DHT of a client only repeats what it was told
            host=host or seen.seen_host,
            nat=seen.nat,
            open_hosts=tuple(host for reached, host in seen.dialed.values() if reached),
            closed_hosts=tuple(host for reached, host in seen.dialed.values() if not reached),
        )
        if found.tcp is False and before.tcp:
            self._events.append(MappingDoubted())  # the router may have forgotten it
        if found.tcp is None and before.tcp is not None:
            found = replace(before, nat=seen.nat)  # nobody answered: what was known stands
        self._take(found)
        return found.tcp is not None

    def _take(self, found: Reachability) -> None:
        before, self.reachability = self.reachability, found
        if found != before:
            self._events += map(Notice, found.sentences(self.outside_port))
        if found.tcp is not None:
            is_news = replace(found, nat=before.nat, udp=before.udp) != before
            self._events.append(RoleFound(found.tcp is False and before.tcp is not False, is_news))
