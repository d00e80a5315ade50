"""The UPnP client against a router in this process: discovery, mappings, and routers that are none or lie.

A real one (miniupnpd) is asked in `tests/nat`.
"""

import contextlib
import re
from collections.abc import AsyncIterator, Iterable, Sequence

import pytest
from aiohttp import web

from tesseract_async.nat import upnp
from tesseract_async.nat.port_mapping import Gateway, GatewayRefused, PortTaken

SERVICE = "urn:schemas-upnp-org:service:WANIPConnection:1"

DEVICE = f"""<?xml version="1.0"?><root xmlns="urn:schemas-upnp-org:device-1-0">
<specVersion><major>1</major><minor>0</minor></specVersion><device>
<deviceType>urn:schemas-upnp-org:device:InternetGatewayDevice:1</deviceType><friendlyName>box</friendlyName>
<manufacturer>m</manufacturer><modelName>n</modelName><UDN>uuid:1</UDN>
<serviceList><service><serviceType>{SERVICE}</serviceType><serviceId>urn:upnp-org:serviceId:WANIPConn1</serviceId>
<SCPDURL>/scpd.xml</SCPDURL><controlURL>/control</controlURL><eventSubURL>/event</eventSubURL></service></serviceList>
</device></root>"""

MAPPING = ("RemoteHost", "ExternalPort", "Protocol", "InternalPort", "InternalClient", "Enabled")
MAPPING += ("PortMappingDescription", "LeaseDuration")
KINDS = {"ExternalPort": "ui2", "InternalPort": "ui2", "Enabled": "boolean", "LeaseDuration": "ui4"}


def action(name: str, arguments: Iterable[str]) -> str:
    listed = "".join(
        f"<argument><name>New{one}</name><direction>in</direction><relatedStateVariable>{one}</relatedStateVariable>"
        "</argument>"
        for one in arguments
    )
    return f"<action><name>{name}</name><argumentList>{listed}</argumentList></action>"


SCPD = (
    '<?xml version="1.0"?><scpd xmlns="urn:schemas-upnp-org:service-1-0"><actionList>'
    + action("AddPortMapping", MAPPING)
    + action("DeletePortMapping", MAPPING[:3])
    + "</actionList><serviceStateTable>"
    + "".join(
        f'<stateVariable sendEvents="no"><name>{one}</name>'
        f"<dataType>{KINDS.get(one, 'string')}</dataType></stateVariable>"
        for one in MAPPING
    )
    + "</serviceStateTable></scpd>"
)


def fault(code: int) -> str:
    return (
        '<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body><s:Fault><faultcode>s:Client</faultcode>'
        '<faultstring>UPnPError</faultstring><detail><UPnPError xmlns="urn:schemas-upnp-org:control-1-0">'
        f"<errorCode>{code}</errorCode><errorDescription>because</errorDescription></UPnPError></detail></s:Fault>"
        "</s:Body></s:Envelope>"
    )


class Box:
    """A router that describes itself and takes orders over HTTP."""

    def __init__(self, more: Sequence[tuple[str, str]] = ()) -> None:
        self.more = more
        self.device = DEVICE
        self.leases: list[str] = []
        self.removed: list[str] = []
        self.faults: list[int] = []
        self.address = ""
        app = web.Application()
        app.router.add_get("/device.xml", self.describe)
        app.router.add_get("/scpd.xml", self.describe_service)
        app.router.add_post("/control", self.control)
        self._runner = web.AppRunner(app)

    async def describe(self, request: web.Request) -> web.Response:
        return web.Response(text=self.device)

    async def describe_service(self, request: web.Request) -> web.Response:
        return web.Response(text=SCPD)

    async def control(self, request: web.Request) -> web.Response:
        body = await request.text()
        if self.faults:
            return web.Response(text=fault(self.faults.pop(0)), status=500)
        [name] = re.findall(r"<(?:\w+:)?(\w+PortMapping) ", body)
        if name == "AddPortMapping":
            self.leases += re.findall(r"<NewLeaseDuration>(\d+)<", body)
        else:
            self.removed += re.findall(r"<NewExternalPort>(\d+)<", body)
        answer = f'<u:{name}Response xmlns:u="{SERVICE}"/>'
        envelope = (
            f'<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body>{answer}</s:Body></s:Envelope>'
        )
        return web.Response(text=envelope)

    async def start(self) -> None:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.address = f"127.0.0.1:{self._runner.addresses[0][1]}"

    async def aclose(self) -> None:
        await self._runner.cleanup()

    async def search(self, own_host: str) -> list[tuple[str, str]]:
        return [*self.more, (f"http://{self.address}/device.xml", "127.0.0.1")]

    async def find(self) -> Gateway | None:
        """What a node finds that searches for routers."""
        return await upnp.find("127.0.0.1", search=self.search)

    async def found(self) -> Gateway:
        gateway = await self.find()
        assert gateway is not None
        return gateway


@contextlib.asynccontextmanager
async def box(*more: tuple[str, str]) -> AsyncIterator[Box]:
    """One router; `more` are other answers to the search: (location, address)."""
    made = Box(more)
    await made.start()
    yield made
    await made.aclose()


async def test_ports_are_mapped_and_given_back() -> None:
    async with box() as router:
        gateway = await router.found()
        await gateway.add("TCP", 5000, "127.0.0.1", 5000, lease=3600.0)
        await gateway.remove("TCP", 5000)
        assert router.leases == ["3600"] and router.removed == ["5000"]


async def test_what_routers_refuse() -> None:
    async with box() as router:
        gateway = await router.found()
        router.faults = [upnp.CONFLICT]
        with pytest.raises(PortTaken, match="5000 leads to another computer"):
            await gateway.add("TCP", 5000, "127.0.0.1", 5000, lease=3600.0)
        router.faults = [upnp.ONLY_PERMANENT]
        await gateway.add("TCP", 5000, "127.0.0.1", 5000, lease=3600.0)
        assert router.leases == ["0"], "a router that knows no leases is asked without one"
        router.faults = [606, 606]
        with pytest.raises(GatewayRefused, match="because"):
            await gateway.add("TCP", 5000, "127.0.0.1", 5000, lease=3600.0)
        with pytest.raises(GatewayRefused, match="because"):
            await gateway.remove("TCP", 5000)
    with pytest.raises(GatewayRefused, match="does not answer"):
        await gateway.add("TCP", 5000, "127.0.0.1", 5000, lease=3600.0)


ENTITIES = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "x"><!ENTITY c "&b;&b;&b;&b;">]><root>&c;</root>'


@pytest.mark.parametrize(
    "device",
    ["", "no xml", "<root/>", ENTITIES, DEVICE.replace("InternetGateway", "Media"), "x" * (upnp.MAX_BYTES + 1)],
    ids=["empty", "text", "bare", "entities", "no router", "endless"],
)
async def test_what_is_no_router(device: str) -> None:
    async with box() as router:
        router.device = device
        assert await router.find() is None


async def test_a_router_is_asked_where_it_answers_from_only() -> None:
    """A description that sends us elsewhere would have us ask third parties."""
    async with box(("http://192.0.2.1/device.xml", "127.0.0.1")) as router:
        router.device = DEVICE.replace("/control", "http://192.0.2.1/control")
        gateway = await router.find()
        if gateway is not None:
            with pytest.raises(GatewayRefused, match="elsewhere"):
                await gateway.add("TCP", 5000, "127.0.0.1", 5000, lease=3600.0)
