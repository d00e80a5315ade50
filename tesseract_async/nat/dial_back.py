"""Can others dial this node? It asks some of them to try, and believes only what arrives.

``nat.dial_back`` {"port": number, "token": bytes} -> {"host": str}: the called node dials the host from which the call
came (no other one: nobody shall be dialled at a stranger's wish) at that port, says the token there (`preamble`), and
answers which host that was, and at which ``addresses`` it can be reached itself: whoever has IPv4 and IPv6 asks over
both.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from tesseract_async.endpoint.endpoint import Endpoint, IncomingCall, Message
from tesseract_async.errors import NotAllowed, Overloaded, TesseractError, describe
from tesseract_async.identity import PeerID
from tesseract_async.lru import LRU
from tesseract_async.nat import preamble
from tesseract_async.transport.address_scope import AddressScope
from tesseract_async.transport.base import PeerAddress, Pipe, ip_version, join_host_port

logger = logging.getLogger(__name__)

DIAL_BACK: Final = "nat.dial_back"
MAX_ADDRESSES: Final = 4
MAX_LEARNT: Final = 64
"""Helpers whose addresses are remembered."""

Role = Literal["unknown", "client", "public"]
NatKind = Literal["unknown", "none", "keeping", "symmetric"]


@dataclass(frozen=True, slots=True)
class ReachabilitySettings:
    """How often and how hard a node finds out whether it can be reached."""

    num_helpers: int = 2
    """Nodes that are asked to dial back; where two disagree, a third decides."""
    dial_timeout: float = 3.0
    """Seconds that a helper gives to its dial."""
    max_dials: int = 16
    """Dials at the wish of others that may be under way at once ..."""
    max_dials_per_host: int = 2
    """... to one host ..."""
    max_dials_per_minute: int = 120
    """... and in one minute."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a node knows about its own place in the network."""

    tcp: bool | None = None
    """Whether others can dial it; None: nobody was there to try."""
    udp: bool | None = None
    """Whether the DHT's socket was reached by nodes that it had not contacted."""
    host: str | None = None
    """Its address as others see it."""
    nat: NatKind = "unknown"
    """``keeping``: the NAT keeps ports, holes can be punched; ``symmetric``: they most likely cannot."""
    open_hosts: tuple[str, ...] = ()
    """Its addresses at which others have dialled it: at most one of IPv4 and one of IPv6."""
    closed_hosts: tuple[str, ...] = ()
    """Its addresses, as others see them, at which they could not."""

    @property
    def role(self) -> Role:
        """``public``: serves the DHT and is a rendezvous; ``client``: uses them."""
        if self.tcp is False or self.udp is False:
            return "client"
        return "public" if self.tcp else "unknown"

    def sentences(self, port: int) -> list[str]:
        """What was found, and what the user can do about it."""
        where = f"{join_host_port(self.host, port) if self.host else f'port {port}'}"
        v6 = [join_host_port(host, port) for host in self.open_hosts if ":" in host and host != self.host]
        closed_v6 = [host for host in self.closed_hosts if ":" in host and host != self.host]
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
        if self.tcp is None:
            return ["No other node has tried yet whether this one can be reached."]
        found = {
            "none": f"A firewall keeps others from dialling this node (seen as {self.host}).",
            "keeping": f"This node is behind a NAT that keeps ports (seen as {self.host}): holes can be punched.",
            "symmetric": f"This node is behind a symmetric NAT (seen as {self.host}): most peers need a relay.",
            "unknown": f"Others cannot dial this node (seen as {self.host or 'nothing'}).",
        }[self.nat]
        open_v6 = f"Those who have IPv6 dial it directly at {v6[0]}." if v6 else ""
        return [
            found,
            *filter(None, [open_v6]),
            f"To be dialled directly, forward TCP and UDP port {port} in the router to this computer, or open the "
            f"firewall for it, and start the node with that port. Many routers do so if the node asks (--upnp).",
        ]


class DialBackServer:
    """Dials others back at their wish, within limits. `connect` dials ``host:port``."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        connect: Callable[[str], Awaitable[Pipe]],
        own_addresses: Callable[[], Sequence[str]] = lambda: (),
        settings: ReachabilitySettings,
    ) -> None:
        self._metrics = endpoint.metrics
        self._own_addresses = own_addresses
        self._connect = connect
        self._settings = settings
        self._dialling: Counter[str] = Counter()
        self._recent: deque[float] = deque()
        endpoint.handle(DIAL_BACK, self._dial_back)

    async def _dial_back(self, call: IncomingCall) -> Message:
        settings = self._settings
        now = asyncio.get_running_loop().time()
        body = call.body if type(call.body) is dict else {}
        port, token = body.get("port"), body.get("token")
        if type(port) is not int or not 0 < port < 65536 or type(token) is not bytes or len(token) != 16:
            raise NotAllowed("dialling back takes a port and a token of 16 bytes")
        if not call.origin:
            raise NotAllowed("you have no address")
        while self._recent and self._recent[0] <= now - 60:
            self._recent.popleft()
        if (
            self._dialling.total() >= settings.max_dials
            or self._dialling[call.origin] >= settings.max_dials_per_host
            or len(self._recent) >= settings.max_dials_per_minute
        ):
            self._metrics.count("dial_backs_refused", reason="too_many")
            raise Overloaded("too many nodes want to be dialled back", retry_after=10.0)
        self._recent.append(now)
        self._dialling[call.origin] += 1
        try:
            async with asyncio.timeout(settings.dial_timeout):
                pipe = await self._connect(join_host_port(call.origin, port))
        except (OSError, TesseractError) as error:
            logger.debug("%s cannot be dialled back: %s", call.peer_id.short, describe(error))
        else:
            pipe.write(preamble.encode_preamble(preamble.PROBE, token))
            pipe.close()
        finally:
            self._dialling[call.origin] -= 1
            self._dialling += Counter()  # drops zeros
        self._metrics.count("dial_backs")
        return Message({"host": call.origin, "addresses": list(self._own_addresses()[:MAX_ADDRESSES])})


class Reachability:
    """Asks other nodes to dial this one at `port`. Give `pipe_arrived` every pipe with a probe's preamble."""

    def __init__(
        self, endpoint: Endpoint, *, settings: ReachabilitySettings, scope: AddressScope | None = None
    ) -> None:
        """`scope`: where this node may send on a stranger's word; None: anywhere."""
        self._endpoint = endpoint
        self._scope = scope
        self._settings = settings
        self._expected: dict[bytes, asyncio.Event] = {}
        self._learnt: LRU[PeerID, tuple[str, ...]] = LRU(MAX_LEARNT)

    def also(self, version: int) -> list[PeerAddress]:
        """Nodes that have helped, at the addresses of this kind (4 or 6) that they named: by word only."""
        return [
            PeerAddress(peer_id, (address,))
            for peer_id, addresses in self._learnt.items()
            for address in addresses
            if ip_version(address) == version
        ]

    async def learn(self, helpers: Sequence[PeerAddress], *, port: int) -> None:
        """Has those of `helpers` that were not asked yet, four at most, name their addresses."""
        unheard = [helper for helper in helpers if helper.peer_id not in self._learnt]
        await asyncio.gather(*(self._ask(helper, port) for helper in unheard[:4]))

    def pipe_arrived(self, token: bytes, pipe: Pipe) -> None:
        """Somebody dialled back."""
        arrived = self._expected.get(token)
        if arrived is not None:
            arrived.set()
        pipe.abort()

    async def check(self, helpers: Sequence[PeerAddress], *, port: int) -> tuple[bool | None, str | None]:
        """Whether two of `helpers` (a third, where they disagree) reach this node, and the address they see.

        None: nobody could be asked.
        """
        votes: list[bool] = []
        hosts: Counter[str] = Counter()
        queue = list(helpers)
        while queue:
            missing = self._settings.num_helpers - len(votes)
            if missing <= 0:
                if len(set(votes)) == 1 or len(votes) > self._settings.num_helpers:
                    break
                missing = 1
            asked, queue = queue[:missing], queue[missing:]
            for result in await asyncio.gather(*(self._ask(helper, port) for helper in asked)):
                if result is not None:
                    reached, host = result
                    votes.append(reached)
                    hosts[host] += 1
        if not votes:
            return None, None
        return sum(votes) * 2 > len(votes), hosts.most_common(1)[0][0]

    async def _ask(self, helper: PeerAddress, port: int) -> tuple[bool, str] | None:
        token = os.urandom(16)
        self._expected[token] = arrived = asyncio.Event()
        timeout = self._settings.dial_timeout + 3.0
        try:
            await self._speak_as(helper)
            body = {"port": port, "token": token}
            reply = await self._endpoint.call(helper, DIAL_BACK, body, timeout=timeout, max_reply_bytes=16 * 1024)
            host = reply.body.get("host") if type(reply.body) is dict else None
            if type(host) is not str or len(host) > 64:
                return None
            self._learn(helper, reply.body.get("addresses"))
            try:
                # the answer travels beside the proof, and may be faster
                async with asyncio.timeout(1.0):
                    await arrived.wait()
            except TimeoutError:
                return False, host
            return True, host
        except (TesseractError, TimeoutError) as error:
            logger.debug("%s does not dial back: %s", helper.short, describe(error))
            return None
        finally:
            del self._expected[token]

    async def _speak_as(self, helper: PeerAddress) -> None:
        """Makes sure that the helper hears us by the kind of IP of its address here: it dials back where we call from.

        Raises: PeerUnreachable.
        """
        version = ip_version(helper.addresses[0])
        mine = [info.path for info in self._endpoint.connections() if info.peer_id == helper.peer_id]
        spoken = [ip_version(path.rpartition(" ")[2]) for path in mine]
        if version is not None and spoken and version not in spoken:
            await self._endpoint.upgrade(helper)

    def _learn(self, helper: PeerAddress, addresses: object) -> None:
        """Untrusted: whoever answers there has to prove its id."""
        if helper.peer_id is None or type(addresses) is not list or len(addresses) > MAX_ADDRESSES:
            return
        found = tuple(text for text in addresses if type(text) is str and ip_version(text) is not None)
        found = found if self._scope is None else self._scope.allowed(found)
        self._learnt[helper.peer_id] = found
