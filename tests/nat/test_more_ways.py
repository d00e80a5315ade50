"""IPv6 beside a NAT, routers that map ports, outside STUN and TURN servers, and paths that become better."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.nat.lab import Lab, why_not
from tests.nat.swarm import Swarm

reason = why_not("miniupnpd", "turnserver")
pytestmark = [pytest.mark.timeout(120)]
if reason is not None and not os.environ.get("TESSERACT_REQUIRE_NAT"):
    pytestmark.append(pytest.mark.skip(reason=reason))

SEEDS = ("r1", "r2")


def kinds(result: dict[str, Any], peer_id: str) -> set[str]:
    return {text.partition(" ")[0] for text in result["paths"][peer_id]}


def train(swarm: Swarm, trainer: str, server: str) -> dict[str, Any]:
    result: dict[str, Any] = swarm.do(trainer, "train", uid=f"{server}.0")
    assert result.get("equal") and result["error"] == "", result
    return result


def test_ipv6_where_there_is_one(tmp_path: Path) -> None:
    """A server with IPv6 alone, and one behind an IPv4 NAT whose router lets IPv6 in, are dialled by who has both.

    The second one and the trainer know one seed, by its IPv4 address: that IPv6 leads to the server, it finds out.
    """
    hosts = {"r1": "public v6", "r2": "public v6", "only": "only6", "both": "keeping open6", "t": "symmetric v6"}
    hosts["old"] = "keeping"
    with Lab(hosts) as lab, Swarm(lab, tmp_path, public=SEEDS) as swarm:
        swarm.start(SEEDS)
        found = swarm.start(("only", "both"))
        assert found["only"]["role"] == "public" and lab.hosts["only"].v6 in found["only"]["report"][0]
        assert found["both"]["role"] == "client" and lab.hosts["both"].v6 in found["both"]["report"][1]
        for server in ("only", "both"):
            swarm.do(server, "serve", uid=f"{server}.0")
        swarm.start(("t", "old"))
        for server in ("only", "both"):
            result = train(swarm, "t", server)
            assert result["paths"][swarm.peer_ids[server]][0] == f"tcp [{lab.hosts[server].v6}]:31337"
        # whoever has IPv4 only needs a relay that has both, or a hole
        assert kinds(train(swarm, "old", "only"), swarm.peer_ids["only"]) == {"relay"}
        assert kinds(train(swarm, "old", "both"), swarm.peer_ids["both"]) == {"datachannel"}


def test_a_router_is_asked_to_map_the_port(tmp_path: Path) -> None:
    hosts = {"r1": "public", "r2": "public", "s": "symmetric upnp", "t": "keeping"}
    with Lab(hosts) as lab:
        with Swarm(lab, tmp_path, public=SEEDS, options={"s": {"upnp": True}}) as swarm:
            swarm.start(SEEDS)
            found = swarm.start(("s",))["s"]
            assert found["role"] == "public", found
            assert f"{lab.hosts['s'].outside}:31337" in found["report"][0] and "maps its port" in found["report"][-1]
            assert lab.mapped_ports("s") == 2
            swarm.do("s", "serve", uid="s.0")
            swarm.start(("t",))
            assert kinds(train(swarm, "t", "s"), swarm.peer_ids["s"]) == {"tcp"}
        assert lab.mapped_ports("s") == 0, "a node that leaves takes its mappings back"


def test_a_server_that_can_be_dialled_now_is_dialled(tmp_path: Path) -> None:
    """Its owner opens the router's port while training goes on through a relay: new calls go directly."""
    hosts = {"r1": "public", "r2": "public", "s": "symmetric", "t": "keeping"}
    with Lab(hosts) as lab, Swarm(lab, tmp_path, public=SEEDS) as swarm:
        swarm.start(SEEDS)
        swarm.start(("s", "t"))
        swarm.do("s", "serve", uid="s.0")
        assert kinds(train(swarm, "t", "s"), swarm.peer_ids["s"]) == {"relay"}
        lab.forward("s")
        assert swarm.do("s", "find_out")[0] == f"{lab.hosts['s'].outside}:31337"
        deadline = time.monotonic() + 15  # the trainer reads the server's record anew every 10 s
        first = "relay"
        while first != "tcp" and time.monotonic() < deadline:
            result = train(swarm, "t", "s")  # without an error: the change disturbs no call
            first = result["paths"][swarm.peer_ids["s"]][0].partition(" ")[0]
            time.sleep(0.1)
        assert first == "tcp"
