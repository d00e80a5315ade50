"""Asks a home router for port mappings by UPnP (Internet Gateway Device), with async-upnp-client: an optional extra.

A device that answers in the local network is hardly trusted: it is asked only at the address from which it answers, its
bytes and seconds are limited, and its XML is read by a parser without entities.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import timedelta
from ipaddress import IPv4Address
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
from async_upnp_client.client import UpnpRequester
from async_upnp_client.client_factory import UpnpFactory
from async_upnp_client.const import HttpRequest, HttpResponse
from async_upnp_client.exceptions import UpnpActionError, UpnpCommunicationError
from async_upnp_client.profiles.igd import IgdDevice
from async_upnp_client.search import SsdpSearchListener

from tesseract_async.errors import describe
from tesseract_async.nat.port_mapping import Gateway, GatewayRefused, PortTaken
from tesseract_async.tasks import in_time

logger = logging.getLogger(__name__)

SEARCH_TIMEOUT: Final = 2.0
"""Seconds in which routers must have answered; they may wait for one."""
CALL_TIMEOUT: Final = 5.0
MAX_BYTES: Final = 2**20
"""Longest answer of a router."""
MAX_ROUTERS: Final = 4
SEARCH_TARGET: Final = "urn:schemas-upnp-org:device:InternetGatewayDevice:1"
"""Newer gateways answer to it, too (UDA 1.1, section 1.3)."""

# UPnP IGD WANIPConnection:2, section 2.5.16
CONFLICT: Final = 718
ONLY_PERMANENT: Final = 725
ANYWHERE: Final = IPv4Address("0.0.0.0")


DeviceSearch = Callable[[str], Awaitable[list[tuple[str, str]]]]


async def find(own_host: str, *, search: DeviceSearch | None = None) -> Gateway | None:
    """Return the first router that answers in the network of `own_host` and can map ports; None if none does."""
    for location, address in await (search or search_network)(own_host):
        try:
            async with asyncio.timeout(2 * CALL_TIMEOUT):
                device = await UpnpFactory(_Requester(address), non_strict=True).async_create_device(location)
            gateway = IgdDevice(device, None)
        except Exception as error:  # whatever a strange device makes the library raise, it is no router for us
            logger.info("%s answers like a router, but is none: %s", address, describe(error))
            continue
        if gateway._any_action(["WANIPC", "WANPPPC"], "AddPortMapping") is not None:
            return _UpnpGateway(gateway)
    return None


async def search_network(own_host: str) -> list[tuple[str, str]]:
    """Return where routers describe themselves, and the addresses that they answered from."""
    found: dict[str, str] = {}
    first = asyncio.Event()

    async def answered(headers: Any) -> None:
        location, address = str(headers.get("location", "")), str(headers.get("_host", ""))
        if urlsplit(location).hostname == address and len(found) < MAX_ROUTERS:
            found[location] = address
            first.set()

    listener = SsdpSearchListener(
        async_callback=answered,
        source=(own_host, 0),
        timeout=1,
        search_target=SEARCH_TARGET,
        loop=asyncio.get_running_loop(),
    )
    try:
        await listener.async_start()
    except OSError as error:
        raise GatewayRefused(f"The local network cannot be asked for a router: {describe(error)}") from None
    try:
        listener.async_search()
        await in_time(first.wait(), SEARCH_TIMEOUT)
    finally:
        listener.async_stop()
        await asyncio.sleep(0)  # the socket closes in the loop's next turn
    return list(found.items())


class _UpnpGateway:
    def __init__(self, device: IgdDevice) -> None:
        self._device = device

    async def add(self, protocol: str, outside_port: int, host: str, port: int, *, lease: float) -> None:
        try:
            await self._device.async_add_port_mapping(
                remote_host=ANYWHERE,
                external_port=outside_port,
                protocol=protocol,
                internal_port=port,
                internal_client=IPv4Address(host),
                enabled=True,
                description="tesseract",
                lease_duration=timedelta(seconds=lease),
            )
        except Exception as error:  # a router's nonsense makes the library raise whatever
            if not lease or not isinstance(error, UpnpActionError) or error.error_code != ONLY_PERMANENT:
                raise _refusal(error, outside_port) from None
            await self.add(protocol, outside_port, host, port, lease=0.0)

    async def remove(self, protocol: str, outside_port: int) -> None:
        try:
            await self._device.async_delete_port_mapping(ANYWHERE, outside_port, protocol)
        except Exception as error:  # as above
            raise _refusal(error, outside_port) from None


def _refusal(error: Exception, port: int) -> GatewayRefused:
    if isinstance(error, UpnpActionError):
        if error.error_code == CONFLICT:
            return PortTaken(f"The router's port {port} leads to another computer.")
        return GatewayRefused(f"The router does not map ports: {error.error_desc or error.error_code}.")
    return GatewayRefused(f"The router does not answer: {describe(error)}.")


class _Requester(UpnpRequester):
    """Speaks HTTP with one address only, and reads no more than `MAX_BYTES`."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def async_http_request(self, http_request: HttpRequest) -> HttpResponse:
        url = http_request.url
        if urlsplit(url).hostname != self._address or urlsplit(url).scheme != "http":
            raise UpnpCommunicationError(f"the router {self._address} points elsewhere")
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=CALL_TIMEOUT)) as session,
                session.request(
                    http_request.method,
                    url,
                    headers=http_request.headers,
                    data=http_request.body,
                    allow_redirects=False,
                ) as response,
            ):
                body = bytearray()
                async for chunk in response.content.iter_chunked(65_536):
                    body += chunk
                    if len(body) > MAX_BYTES:
                        raise UpnpCommunicationError("the router talks too much")
                return HttpResponse(response.status, response.headers, body.decode("utf-8", "replace"))
        except (aiohttp.ClientError, OSError) as error:
            raise UpnpCommunicationError(describe(error)) from None
