"""Keeps a hole in the home router's wall: asks it to pass a port on to this computer, and takes that back on leaving.

What speaks with the router is a `Gateway` (`upnp`, an optional extra). A mapping that the router has promised proves
nothing: there may be a second NAT behind it. Whether others get through, dial-back finds out as for any address.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol

from tesseract_async.metrics import Metrics

logger = logging.getLogger(__name__)

PROTOCOLS: Final = ("TCP", "UDP")


class GatewayRefused(Exception):
    """The router does not do what it was asked; `args[0]` is a sentence."""


class PortTaken(GatewayRefused):
    """That port leads to somebody else."""


class Gateway(Protocol):
    """A router that maps ports if it is asked. All of it may raise GatewayRefused."""

    async def add(self, protocol: str, outside_port: int, host: str, port: int, *, lease: float) -> None:
        """Passes what arrives at `outside_port` on to `host` (this computer's IPv4 address) for `lease` seconds.

        Raises: PortTaken.
        """

    async def remove(self, protocol: str, outside_port: int) -> None:
        """Ends `add`."""


@dataclass(frozen=True, slots=True)
class PortMappingSettings:
    """How a port mapping is kept."""

    lease: float = 3600.0
    """Seconds for which the router promises a mapping; it is renewed after half of them."""
    retry_after: float = 300.0
    """Seconds after which a router that was not found, or refused, is asked again."""
    num_ports: int = 4
    """Outside ports that are tried: this node's own, then random ones."""
    farewell_timeout: float = 3.0
    """Seconds that taking a mapping back may take."""


class PortMapper:
    """Keeps one outside port mapped to the node's own, TCP and UDP.

    `find` looks for the router (None: there is none); `own_host` tells this computer's IPv4 address in its network.
    `changed` is called when `outside_port` has changed.
    """

    def __init__(
        self,
        find: Callable[[str], Awaitable[Gateway | None]],
        *,
        port: int,
        own_host: Callable[[], str | None],
        changed: Callable[[], None],
        metrics: Metrics,
        settings: PortMappingSettings | None = None,
    ) -> None:
        self._find = find
        self._port = port
        self._own_host = own_host
        self._changed = changed
        self._metrics = metrics
        self._settings = settings if settings is not None else PortMappingSettings()
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
        """Why there is no mapping, for people."""

    def start(self) -> None:
        """Asks for the mapping in the background, and keeps it."""
        self._task = asyncio.get_running_loop().create_task(self._keep())

    def renew(self) -> None:
        """Asks again now: the network may have changed, or the router forgotten."""
        self._again.set()

    async def aclose(self) -> None:
        """Takes the mapping back."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        with contextlib.suppress(TimeoutError):  # the lease ends by itself
            async with asyncio.timeout(self._settings.farewell_timeout):
                await self._remove()

    def sentence(self) -> str:
        """What came of it, for people."""
        if self.outside_port is not None:
            return f"The router maps its port {self.outside_port} to this node."
        return self.trouble

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
                self._changed()
            settings = self._settings
            wait = settings.lease / 2 if self.outside_port is not None else settings.retry_after
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._again.wait()

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
        settings = self._settings
        wishes = [self.outside_port or self._port]
        wishes += [self._rng.randrange(20_000, 60_000) for _ in range(settings.num_ports - 1)]
        for wish in wishes:
            try:
                for protocol in PROTOCOLS:
                    await self._gateway.add(protocol, wish, host, self._port, lease=settings.lease)
            except PortTaken as error:
                self.trouble = str(error)
                continue
            self.outside_port = wish
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
