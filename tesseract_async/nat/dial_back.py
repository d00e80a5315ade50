"""Dial-back: helpers test whether others can dial this node, which believes only in connections that arrive.

``nat.dial_back`` {"port": number, "token": bytes} -> {"host": str, "addresses": [...]}: the called node dials the host
from which the call came (no other one, or strangers could have anybody dialed) at that port, sends the token there
(`preamble`), and answers which host that was, and at which addresses it can be reached itself: a node that has IPv4
and IPv6 asks over both.
"""

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from tesseract_async.endpoint.endpoint import Endpoint, IncomingCall, Message
from tesseract_async.errors import NotAllowed, Overloaded, TesseractError, describe
from tesseract_async.identity import PeerID
from tesseract_async.lru import LRU
from tesseract_async.nat import preamble
from tesseract_async.network.address_scope import AddressScope
from tesseract_async.tasks import in_time
from tesseract_async.transport import tcp
from tesseract_async.transport.base import PeerAddress, Pipe, ip_version, join_host_port
from tesseract_async.transport.token_bucket import TokenBucket

logger = logging.getLogger(__name__)

DIAL_BACK: Final = "nat.dial_back"
MAX_ADDRESSES: Final = 4
MAX_LEARNT: Final = 64
"""Helpers whose addresses are remembered."""
NUM_HELPERS: Final = 2
"""Nodes that are asked to dial back; where two disagree, a third decides."""
MAX_ASKED: Final = 6
"""Helpers that are tried in one check and version of IP."""
DIAL_TIMEOUT: Final = 3.0
"""Seconds that a helper gives to its dial."""
PROOF_TIMEOUT: Final = 1.0
"""Seconds by which a helper's reply may arrive before the proof, which travels on another connection."""
MAX_DIALS: Final = 16
"""Dials for others that may be under way at once."""
MAX_DIALS_PER_HOST: Final = 2
"""Dials for others to one host that may be under way at once."""
MAX_DIALS_PER_MINUTE: Final = 120
"""Dials for others in one minute."""


class DialBack:
    """Asks other nodes to dial this one, and dials others when they ask, within limits.

    Give `pipe_arrived` every pipe with a probe's preamble.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        own_addresses: Callable[[], Sequence[str]],
        scope: AddressScope,
        dial_timeout: float = DIAL_TIMEOUT,
        proof_timeout: float = PROOF_TIMEOUT,
    ) -> None:
        """`own_addresses` returns where others can dial this node. `scope`: where it may send on a stranger's word.
        `dial_timeout`: seconds for one dial. `proof_timeout`: see `PROOF_TIMEOUT`."""
        self._endpoint = endpoint
        self._own_addresses = own_addresses
        self._scope = scope
        self._dial_timeout = dial_timeout
        self._proof_timeout = proof_timeout
        self._dialing: Counter[str] = Counter()
        self._rate = TokenBucket(MAX_DIALS_PER_MINUTE / 60, burst=MAX_DIALS_PER_MINUTE)
        self._expected: dict[bytes, asyncio.Event] = {}
        self._learned: LRU[PeerID, tuple[str, ...]] = LRU(MAX_LEARNT)

    def start(self) -> None:
        self._endpoint.handle(DIAL_BACK, self._dial_back)

    async def _dial_back(self, call: IncomingCall) -> Message:
        now = asyncio.get_running_loop().time()
        body = call.body if type(call.body) is dict else {}
        port, token = body.get("port"), body.get("token")
        if type(port) is not int or not 0 < port < 65536 or type(token) is not bytes or len(token) != 16:
            raise NotAllowed("dialing back takes a port and a token of 16 bytes")
        if not call.origin:
            raise NotAllowed("you have no address")
        if (
            self._dialing.total() >= MAX_DIALS
            or self._dialing[call.origin] >= MAX_DIALS_PER_HOST
            or not self._rate.spend(1, now)
        ):
            self._endpoint.metrics.count("dial_backs_refused", reason="too_many")
            raise Overloaded("too many nodes want to be dialed back", retry_after=10.0)
        self._dialing[call.origin] += 1
        try:
            async with asyncio.timeout(self._dial_timeout):
                pipe = await tcp.connect(join_host_port(call.origin, port))
        except (OSError, TesseractError) as error:
            logger.debug("%s cannot be dialed back: %s", call.peer_id.short, describe(error))
        else:
            pipe.write(preamble.encode_preamble(preamble.PROBE, token))
            pipe.close()
        finally:
            self._dialing[call.origin] -= 1
            self._dialing += Counter()  # drops zeros
        self._endpoint.metrics.count("dial_backs")
        return Message({"host": call.origin, "addresses": list(self._own_addresses()[:MAX_ADDRESSES])})

    def also(self, version: int) -> list[PeerAddress]:
        """Return the nodes that have helped, at the addresses of this version of IP that they named (unproven)."""
        return [
            PeerAddress(peer_id, (address,))
            for peer_id, addresses in self._learned.items()
            for address in addresses
            if ip_version(address) == version
        ]

    async def learn(self, helpers: Sequence[PeerAddress], *, port: int) -> None:
        """Have up to four of `helpers` that were not asked yet name their addresses."""
        unheard = [helper for helper in helpers if helper.peer_id not in self._learned]
        await asyncio.gather(*(self._ask(helper, port) for helper in unheard[:4]))

    def pipe_arrived(self, token: bytes, pipe: Pipe) -> None:
        arrived = self._expected.get(token)
        if arrived is not None:
            arrived.set()
        pipe.abort()

    async def check_all(self, helpers: Sequence[PeerAddress], ports: Mapping[int, int]) -> dict[int, tuple[bool, str]]:
        """Run `check` for each version of IP in `ports`, at its port. Returns its results by version, 4 first, where
        some helper could be asked: among `helpers`, and those that had named an address of that version."""
        found: dict[int, tuple[bool, str]] = {}

        async def ask(version: int) -> None:
            fit = [peer for peer in helpers if ip_version(peer.addresses[0]) == version] + self.also(version)
            result = await self.check(fit[:MAX_ASKED], port=ports[version])
            if result is not None:
                found[ip_version(join_host_port(result[1], 1)) or version] = result

        await asyncio.gather(*map(ask, ports))
        for version in ports:
            if version not in found:  # helpers by the other version may have named their addresses meanwhile
                await ask(version)
        return dict(sorted(found.items()))

    async def check(self, helpers: Sequence[PeerAddress], *, port: int) -> tuple[bool, str] | None:
        """Return whether two of `helpers` (a third, where they disagree) reach this node at `port`, and the host that
        they see; None if none could be asked."""
        votes: list[bool] = []
        hosts: Counter[str] = Counter()
        queue = list(helpers)
        while queue:
            missing = NUM_HELPERS - len(votes)
            if missing <= 0:
                if len(set(votes)) == 1 or len(votes) > NUM_HELPERS:
                    break
                missing = 1
            asked, queue = queue[:missing], queue[missing:]
            for result in await asyncio.gather(*(self._ask(helper, port) for helper in asked)):
                if result is not None:
                    reached, host = result
                    votes.append(reached)
                    hosts[host] += 1
        if not votes:
            return None
        return sum(votes) * 2 > len(votes), hosts.most_common(1)[0][0]

    async def _ask(self, helper: PeerAddress, port: int) -> tuple[bool, str] | None:
        token = os.urandom(16)
        self._expected[token] = arrived = asyncio.Event()
        timeout = self._dial_timeout + 3.0
        try:
            # the helper dials the host that it hears: it has to hear us by the version of IP of its address here
            version = ip_version(helper.addresses[0])
            connections = [info for info in self._endpoint.connections() if info.peer_id == helper.peer_id]
            spoken = [ip_version(info.path.rpartition(" ")[2]) for info in connections]
            if version is not None and spoken and version not in spoken:
                await self._endpoint.upgrade(helper)
            body = {"port": port, "token": token}
            reply = await self._endpoint.call(helper, DIAL_BACK, body, timeout=timeout, max_reply_bytes=16 * 1024)
            host = reply.body.get("host") if type(reply.body) is dict else None
            if type(host) is not str or len(host) > 64:
                return None
            self._learn(helper, reply.body.get("addresses"))
            return await in_time(arrived.wait(), self._proof_timeout), host
        except (TesseractError, TimeoutError) as error:
            logger.debug("%s does not dial back: %s", helper.short, describe(error))
            return None
        finally:
            del self._expected[token]

    def _learn(self, helper: PeerAddress, addresses: object) -> None:
        """Remember the addresses that a helper named. Untrusted: the node that answers there has to prove its id."""
        if helper.peer_id is None or type(addresses) is not list or len(addresses) > MAX_ADDRESSES:
            return
        found = (text for text in addresses if type(text) is str and ip_version(text) is not None)
        self._learned[helper.peer_id] = self._scope.allowed(found)
