"""IPv6 next to a NAT, routers that map ports, an outside STUN server, and paths that become better."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nat.lab import Lab, why_not
from tests.nat.swarm import Swarm
from tests.stem import Stem

reason = why_not("miniupnpd")
if reason is not None and not os.environ.get("TESSERACT_REQUIRE_NAT"):
    pytestmark = pytest.mark.skip(reason=reason)

SEEDS = ("r1", "r2")
HOSTS = {
    "r1": "public v6",
    "r2": "public v6",
    "only": "only6",
    "both": "keeping open6",
    "mapped": "symmetric upnp",
    "t6": "symmetric v6",
    "t4": "keeping",
}
SERVERS = ("only", "both", "mapped")
STUN_SERVER = """
import socket, sys
from tesseract_async.wire import stun
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
    bound.bind((sys.argv[1], 3478))
    while True:
        data, source = bound.recvfrom(2048)
        if answer := stun.answer(data, source):
            bound.sendto(answer, source)
"""


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory, stem: Stem) -> Iterator[Swarm]:
    """Servers that are reached in other ways than `test_nat`'s."""
    with Lab(HOSTS) as lab:
        options: dict[str, dict[str, Any]] = {"mapped": {"upnp": True}}
        with Swarm(stem, lab, tmp_path_factory.mktemp("more"), public=SEEDS, options=options) as made:
            made.start(SEEDS)
            made.roles = made.start(SERVERS)  # type: ignore[attr-defined]
            for name in SERVERS:
                made.do(name, "serve", uid=f"{name}.0")
            made.roles |= made.start(("t6", "t4"))  # type: ignore[attr-defined]
            yield made
        assert lab.mapped_ports("mapped") == 0, "a node that leaves takes its mappings back"


def kinds(result: dict[str, Any], peer_id: str) -> set[str]:
    return {text.partition(" ")[0] for text in result["paths"][peer_id]}


def train(swarm: Swarm, trainer: str, server: str) -> dict[str, Any]:
    result: dict[str, Any] = swarm.do(trainer, "train", uid=f"{server}.0")
    assert result.get("equal") and result["error"] == "", result
    return result


def path(swarm: Swarm, trainer: str, server: str) -> str:
    """The one that the trainer's call took."""
    first: str = train(swarm, trainer, server)["paths"][swarm.peer_ids[server]][0]
    return first


def test_each_node_finds_out_its_addresses_of_both_kinds(swarm: Swarm) -> None:
    """`both` knows one seed, by its IPv4 address: that IPv6 leads to itself, it finds out with the others' help."""
    roles = swarm.roles  # type: ignore[attr-defined]
    assert roles["only"]["role"] == "public" and swarm.lab.hosts["only"].v6 in roles["only"]["report"][0]
    assert roles["both"]["role"] == "client" and "keeps ports" in roles["both"]["report"][0]
    assert swarm.lab.hosts["both"].v6 in roles["both"]["report"][1]
    assert roles["t6"]["role"] == "client" and "symmetric" in roles["t6"]["report"][0]


@pytest.mark.parametrize("server", ["only", "both"])
def test_ipv6_where_there_is_one(swarm: Swarm, server: str) -> None:
    """Who has both dials a server with IPv6 alone, and one behind an IPv4 NAT whose router lets IPv6 in."""
    assert path(swarm, "t6", server) == f"tcp [{swarm.lab.hosts[server].v6}]:31337"


def test_who_has_ipv4_alone_needs_a_hole_or_a_relay_that_has_both(swarm: Swarm) -> None:
    assert path(swarm, "t4", "both").startswith("datachannel")
    assert path(swarm, "t4", "only").startswith("relay 203.0.113.")


def test_a_router_is_asked_to_map_the_port(swarm: Swarm) -> None:
    found = swarm.roles["mapped"]  # type: ignore[attr-defined]
    outside = f"{swarm.lab.hosts['mapped'].outside}:31337"
    assert found["role"] == "public" and outside in found["report"][0] and "maps its port" in found["report"][-1]
    assert swarm.lab.mapped_ports("mapped") == 2
    assert path(swarm, "t4", "mapped") == f"tcp {outside}"


@pytest.mark.slow
def test_an_outside_server_tells_the_kind_of_nat(stem: Stem, tmp_path: Path) -> None:
    """With one node of the swarm to ask, a symmetric NAT cannot be told from one that keeps ports."""
    with Lab({"r1": "public", "m": "machine", "k": "keeping", "s": "symmetric"}) as lab:
        lab.start_daemon("m", sys.executable, "-c", STUN_SERVER, lab.hosts["m"].address)
        options = {name: {"stun_servers": [f"{lab.hosts['m'].address}:3478"]} for name in ("k", "s")}
        with Swarm(stem, lab, tmp_path, public=("r1",), options=options) as swarm:
            swarm.start(("r1",))
            found = swarm.start(("k", "s"))
            assert "keeps ports" in found["k"]["report"][0] and "symmetric" in found["s"]["report"][0]


@pytest.mark.slow
def test_a_server_that_can_be_dialed_now_is_dialed(stem: Stem, tmp_path: Path) -> None:
    """Its owner opens the router's port while training goes on through a relay: new calls go directly."""
    hosts = {"r1": "public", "r2": "public", "s": "symmetric", "t": "keeping"}
    with Lab(hosts) as lab, Swarm(stem, lab, tmp_path, public=SEEDS) as swarm:
        swarm.start(SEEDS)
        swarm.start(("s", "t"))
        swarm.do("s", "serve", uid="s.0")
        assert path(swarm, "t", "s").startswith("relay")
        lab.forward("s")
        assert swarm.do("s", "find_out")[0] == f"{lab.hosts['s'].outside}:31337"
        deadline = time.monotonic() + 15  # the trainer reads the server's record anew every 10 s
        first = ""
        while not first.startswith("tcp") and time.monotonic() < deadline:
            first = path(swarm, "t", "s")  # without an error: the change disturbs no call
            time.sleep(0.1)
        assert first.startswith("tcp")
