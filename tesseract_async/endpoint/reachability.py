"""Can others dial this node? It asks some of them to try, and believes only what arrives.

``nat.dial_back`` {"port": number, "token": bytes} -> {"host": str}: the called node dials the host from which the call
came (no other one: nobody shall be dialled at a stranger's wish) at that port, says the token there (`preamble`), and
answers which host that was.
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
from tesseract_async.transport import preamble
from tesseract_async.transport.base import PeerAddress, Pipe, join_host_port

logger = logging.getLogger(__name__)

DIAL_BACK: Final = "nat.dial_back"

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

    @property
    def role(self) -> Role:
        """``public``: serves the DHT and is a rendezvous; ``client``: uses them."""
        if self.tcp is False or self.udp is False:
            return "client"
        return "public" if self.tcp else "unknown"

    def sentences(self, port: int) -> list[str]:
        """What was found, and what the user can do about it."""
        where = f"{join_host_port(self.host, port) if self.host else f'port {port}'}"
        if self.tcp and self.udp is not False:
            return [f"Others reach this node at {where}: it takes full part in the network."]
        if self.tcp:
            return [
                f"Others reach this node at {where} by TCP, but not by UDP: it serves experts and holds no keys.",
                f"To take full part, let UDP port {port} through, too.",
            ]
        if self.tcp is None:
            return ["No other node has tried yet whether this one can be reached."]
        found = {
            "none": f"A firewall keeps others from dialling this node (seen as {self.host}).",
            "keeping": f"This node is behind a NAT that keeps ports (seen as {self.host}): holes can be punched.",
            "symmetric": f"This node is behind a symmetric NAT (seen as {self.host}): most peers need a relay.",
            "unknown": f"Others cannot dial this node (seen as {self.host or 'nothing'}).",
        }[self.nat]
        return [
            found,
            f"To be dialled directly, forward TCP and UDP port {port} in the router to this computer, or open the "
            f"firewall for it, and start the node with that port.",
        ]


class DialBackServer:
    """Dials others back at their wish, within limits. `connect` dials ``host:port``."""

    def __init__(
        self, endpoint: Endpoint, *, connect: Callable[[str], Awaitable[Pipe]], settings: ReachabilitySettings
    ) -> None:
        self._metrics = endpoint.metrics
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
        return Message({"host": call.origin})


class Reachability:
    """Asks other nodes to dial this one at `port`. Give `pipe_arrived` every pipe with a probe's preamble."""

    def __init__(self, endpoint: Endpoint, *, settings: ReachabilitySettings) -> None:
        self._endpoint = endpoint
        self._settings = settings
        self._expected: dict[bytes, asyncio.Event] = {}

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
            body = {"port": port, "token": token}
            reply = await self._endpoint.call(helper, DIAL_BACK, body, timeout=timeout, max_reply_bytes=16 * 1024)
            host = reply.body.get("host") if type(reply.body) is dict else None
            if type(host) is not str or len(host) > 64:
                return None
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
