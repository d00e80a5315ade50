"""Keeps a port mapping: asks the home router to pass a port on to this computer, and takes that back on leaving.

A `Gateway` speaks with the router (`upnp`, an optional extra). A mapping that the router has promised proves nothing:
there may be a second NAT behind it. Dial-back finds out whether others get through, as for any address.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from tesseract_async.metrics import Metrics
from tesseract_async.tasks import end, in_time

logger = logging.getLogger(__name__)

PROTOCOLS: Final = ("TCP", "UDP")
LEASE: Final = 3600.0
"""Seconds for which the router promises a mapping; it is renewed after half of them."""
RETRY_AFTER: Final = 300.0
"""Seconds after which a router that was not found, or refused, is asked again."""
NUM_PORTS: Final = 4
"""The number of outside ports that are tried: this node's own, then random ones."""
FAREWELL_TIMEOUT: Final = 3.0
"""Seconds that taking a mapping back may take."""


class GatewayRefused(Exception):
    """The router does not do what it was asked; `args[0]` is a sentence."""


class PortTaken(GatewayRefused):
    """Raised for a port that leads to another computer."""


class Gateway(Protocol):
    """A router that maps ports if it is asked. Raises: GatewayRefused; `add` also PortTaken."""

    async def add(self, protocol: str, outside_port: int, host: str, port: int, *, lease: float) -> None:
        """Pass what arrives at `outside_port` on to `host` (this computer's IPv4 address) for `lease` seconds."""

    async def remove(self, protocol: str, outside_port: int) -> None: ...


class PortMapper:
    """Keeps one outside port mapped to the node's own, TCP and UDP.

    `find` looks for the router (None: there is none); `own_host` returns this computer's IPv4 address in its network.
    `changed` is called with `outside_port` when that has changed.
    """

    def __init__(
        self,
        find: Callable[[str], Awaitable[Gateway | None]],
        *,
        port: int,
        own_host: Callable[[], str | None],
        changed: Callable[[int | None], None],
        metrics: Metrics,
        lease: float = LEASE,
        retry_after: float = RETRY_AFTER,
        farewell_timeout: float = FAREWELL_TIMEOUT,
    ) -> None:
        self._find = find
        self._port = port
        self._own_host = own_host
        self._changed = changed
        self._metrics = metrics
        self._lease = lease
        self._retry_after = retry_after
        self._farewell_timeout = farewell_timeout
        self._gateway: Gateway | None = None
        self._host: str | None = None
        self._rng = random.Random()
        self._again = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.tried = asyncio.Event()
        """Set when the router has been asked for the first time, whatever came of it."""
        self.outside_port: int | None = None
        """The router's port that leads here, as it says itself."""
        self.trouble = "The router has not answered yet."
        """The reason why there is no mapping, for people."""

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._keep())

    def renew(self) -> None:
        """Ask again now: the network may have changed, or the router forgotten."""
        self._again.set()

    async def aclose(self) -> None:
        task, self._task = self._task, None
        await end(task)
        await in_time(self._remove(), self._farewell_timeout)  # the lease ends by itself

    def sentence(self) -> str:
        mapped = f"The router maps its port {self.outside_port} to this node."
        return self.trouble if self.outside_port is None else mapped

    async def _keep(self) -> None:
        while True:
            before = self.outside_port
            self._again.clear()
            try:
                await self._map()
            except GatewayRefused as error:
                self._gateway = self.outside_port = None
                self.trouble = str(error)
            self._metrics.set("port_mapped", float(self.outside_port is not None))
            if self.outside_port != before or not self.tried.is_set():
                logger.info("%s", self.sentence())
            self.tried.set()
            if self.outside_port != before:
                self._changed(self.outside_port)
            wait = self._lease / 2 if self.outside_port is not None else self._retry_after
            await in_time(self._again.wait(), wait)

    async def _map(self) -> None:
        """Raises: GatewayRefused."""
        host = self._own_host()
        if host is None:
            raise GatewayRefused("This computer has no IPv4 address to map a port to.")
        if host != self._host:
            self._gateway, self._host = None, host  # another network, another router
        self._gateway = self._gateway or await self._find(host)
        if self._gateway is None:
            raise GatewayRefused("No router that maps ports (UPnP) was found: it may be switched off there.")
        ports = [self.outside_port or self._port]
        ports += [self._rng.randrange(20_000, 60_000) for _ in range(NUM_PORTS - 1)]
        for port in ports:
            try:
                for protocol in PROTOCOLS:
                    await self._gateway.add(protocol, port, host, self._port, lease=self._lease)
            except PortTaken as error:
                self.trouble = str(error)
                continue
            self.outside_port = port
            return
        raise GatewayRefused(self.trouble)

    async def _remove(self) -> None:
        port, self.outside_port = self.outside_port, None
        if self._gateway is None or port is None:
            return
        for protocol in PROTOCOLS:
            try:
                await self._gateway.remove(protocol, port)
            except GatewayRefused as error:
                logger.info("the router keeps %s port %d until the lease ends: %s", protocol, port, error)
