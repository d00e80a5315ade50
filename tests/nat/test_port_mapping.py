"""`PortMapper` against a router in memory, in virtual time where it waits."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from tesseract_async.metrics import Metrics
from tesseract_async.nat.port_mapping import Gateway, GatewayRefused, PortMapper, PortTaken

PORT = 4000


class Router:
    """Keeps mappings; ports in `taken` lead elsewhere."""

    def __init__(self) -> None:
        self.mappings: dict[tuple[str, int], tuple[str, int, float]] = {}
        self.taken: set[int] = set()
        self.refusal = ""
        self.found = True
        self.num_adds = 0
        self.num_searches = 0
        self.silent = False

    async def find(self, own_host: str) -> Gateway | None:
        self.num_searches += 1
        return self if self.found else None

    async def add(self, protocol: str, outside_port: int, host: str, port: int, *, lease: float) -> None:
        self.num_adds += 1
        if self.refusal:
            raise GatewayRefused(self.refusal)
        if outside_port in self.taken:
            raise PortTaken(f"port {outside_port} is taken")
        self.mappings[protocol, outside_port] = (host, port, lease)

    async def remove(self, protocol: str, outside_port: int) -> None:
        if self.silent:
            await asyncio.Event().wait()
        if self.refusal:
            raise GatewayRefused(self.refusal)
        del self.mappings[protocol, outside_port]


class Home:
    def __init__(self, router: Router, lease: float, retry_after: float, farewell_timeout: float) -> None:
        self.host: str | None = "10.0.0.2"
        self.changes: list[int | None] = []
        self.changed = asyncio.Event()
        self.mapper = PortMapper(
            router.find,
            port=PORT,
            own_host=lambda: self.host,
            changed=self.note,
            metrics=Metrics(),
            lease=lease,
            retry_after=retry_after,
            farewell_timeout=farewell_timeout,
        )

    def note(self, port: int | None) -> None:
        self.changes.append(port)
        self.changed.set()

    async def next_change(self) -> None:
        async with asyncio.timeout(30):
            await self.changed.wait()
        self.changed.clear()


@contextlib.asynccontextmanager
async def home(
    router: Router, *, lease: float = 3600.0, retry_after: float = 300.0, farewell_timeout: float = 3.0
) -> AsyncIterator[Home]:
    made = Home(router, lease, retry_after, farewell_timeout)
    made.mapper.start()
    async with asyncio.timeout(30):
        await made.mapper.tried.wait()
    yield made
    await made.mapper.aclose()


async def test_a_mapping_is_made_and_taken_back() -> None:
    router = Router()
    async with home(router) as node:
        assert node.mapper.outside_port == PORT and node.changes == [PORT]
        assert router.mappings == {("TCP", PORT): ("10.0.0.2", PORT, 3600.0), ("UDP", PORT): ("10.0.0.2", PORT, 3600.0)}
        assert str(PORT) in node.mapper.sentence()
    assert not router.mappings


async def test_it_is_renewed_before_the_lease_ends() -> None:
    router = Router()
    async with home(router, lease=0.02):
        async with asyncio.timeout(30):
            while router.num_adds < 6:  # noqa: ASYNC110 (the router announces nothing)
                await asyncio.sleep(0)
    assert router.num_searches == 1, "a router that answers is not searched for again"


async def test_another_port_where_the_own_one_is_taken() -> None:
    router = Router()
    router.taken = {PORT}
    async with home(router) as node:
        port = node.mapper.outside_port
        assert port is not None and port != PORT
        assert router.mappings["TCP", port] == router.mappings["UDP", port] == ("10.0.0.2", PORT, 3600.0)
    assert not router.mappings


async def test_a_router_that_refuses_is_asked_again_later() -> None:
    router = Router()
    router.refusal = "The router does not want to."
    async with home(router, retry_after=0.01) as node:
        assert node.mapper.outside_port is None and node.mapper.sentence() == router.refusal
        router.refusal = ""
        await node.next_change()
        assert node.changes == [PORT]


async def test_a_router_that_has_forgotten_and_one_that_is_gone() -> None:
    router = Router()
    async with home(router) as node:
        node.changed.clear()
        router.mappings.clear()
        router.refusal = "gone"
        node.mapper.renew()
        await node.next_change()
        assert node.mapper.outside_port is None
        router.refusal, node.host = "", "10.9.0.2"
        node.mapper.renew()
        await node.next_change()
        assert router.mappings["TCP", PORT][0] == "10.9.0.2"
        assert node.changes == [PORT, None, PORT]
        assert router.num_searches == 2
        node.host = None
        node.mapper.renew()
        await node.next_change()
        assert "no IPv4" in node.mapper.sentence()


async def test_no_router_is_no_reason_to_wait() -> None:
    router = Router()
    router.found = False
    async with home(router) as node:
        assert "No router" in node.mapper.sentence() and node.changes == []


async def test_leaving_does_not_wait_for_a_silent_router() -> None:
    router = Router()
    router.silent = True
    async with home(router, farewell_timeout=0.01) as node:
        assert node.mapper.outside_port == PORT
