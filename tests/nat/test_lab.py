"""Nodes behind real NATs train with one another: this kernel's NAT, in network namespaces.

Skipped where namespaces can't be made, unless TESSERACT_REQUIRE_NAT says that they must be.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nat.lab import Lab, why_not
from tests.nat.swarm import Swarm
from tests.stem import Stem

KINDS = {"p": "public", "k": "keeping", "s": "symmetric"}
RENDEZVOUS = ("r1", "r2", "r3")
SERVERS = {f"s{letter}": kind for letter, kind in KINDS.items()}
TRAINERS = {f"t{letter}": kind for letter, kind in KINDS.items()}

EXPECTED = {
    # (server, trainer): the kind of path, and seconds until the first result
    ("public", "public"): ("tcp", 1.0),
    ("public", "keeping"): ("tcp", 1.0),
    ("public", "symmetric"): ("tcp", 1.0),
    ("keeping", "public"): ("reverse", 1.0),
    ("symmetric", "public"): ("reverse", 1.0),
    ("keeping", "keeping"): ("datachannel", 3.0),
    ("keeping", "symmetric"): ("relay", 3.0),
    ("symmetric", "keeping"): ("relay", 3.0),
    ("symmetric", "symmetric"): ("relay", 3.0),
}

reason = why_not()
if reason is not None and not os.environ.get("TESSERACT_REQUIRE_NAT"):
    pytestmark = pytest.mark.skip(reason=reason)


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory, stem: Stem) -> Iterator[Swarm]:
    """Three public nodes, and a server and a trainer behind each kind of NAT."""
    hosts = {**dict.fromkeys(RENDEZVOUS, "public"), **SERVERS, **TRAINERS}
    with Lab(hosts) as lab, Swarm(stem, lab, tmp_path_factory.mktemp("swarm"), public=RENDEZVOUS) as swarm:
        swarm.start(RENDEZVOUS)
        roles = swarm.start(tuple(SERVERS))
        for server in SERVERS:
            swarm.do(server, "serve", uid=f"{server}.0")
        # trainers come later: otherwise a server may have asked one to dial it back, and be connected already
        swarm.roles = roles | swarm.start(tuple(TRAINERS))  # type: ignore[attr-defined]
        yield swarm


@pytest.mark.parametrize("name", [*SERVERS, *TRAINERS])
def test_each_node_finds_out_its_role(swarm: Swarm, name: str) -> None:
    kind = swarm.lab.hosts[name].kind
    role = swarm.roles[name]  # type: ignore[attr-defined]
    assert role["known"]
    assert role["role"] == ("public" if kind == "public" else "client")
    expected = {"public": "takes full part", "keeping": "keeps ports", "symmetric": "symmetric NAT"}
    assert expected[kind] in role["report"][0]
    assert swarm.lab.hosts[name].outside in role["report"][0]


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("server", SERVERS)
def test_every_pair_trains_over_the_expected_path(swarm: Swarm, server: str, trainer: str) -> None:
    path, seconds = EXPECTED[SERVERS[server], TRAINERS[trainer]]
    if path == "reverse" and swarm.peer_ids[server] in swarm.do(trainer, "connections"):
        path = "tcp"  # the server has asked this public node to dial it back: its connection serves calls both ways
    result = swarm.do(trainer, "train", uid=f"{server}.0")
    assert result["error"] == ""
    assert result["equal"], "outputs and gradients differ from the local ones"
    paths = result["paths"][swarm.peer_ids[server]]
    assert {text.partition(" ")[0] for text in paths} == {path}
    assert result["first_seconds"] < seconds
    print(f"{server} <- {trainer}: {paths[0]}, first result after {result['first_seconds']:.2f} s")


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("server", "trainer", "victim"),
    [
        ("sk", "tk", "sk"),
        ("ss", "ts", "ss"),
        pytest.param("sk", "tk", "tk", marks=SLOW),
        pytest.param("ss", "ts", "ts", marks=SLOW),
        pytest.param("sk", "tp", "sk", marks=SLOW),
        pytest.param("ss", "tp", "ss", marks=SLOW),
    ],
)
def test_a_nat_that_forgets_is_survived(swarm: Swarm, server: str, trainer: str, victim: str) -> None:
    """The mapping of every connection is gone; calls succeed again within 15 s, over the same or a new path."""
    assert swarm.do(trainer, "train", uid=f"{server}.0")["equal"]
    swarm.lab.forget_mappings(victim)
    result = swarm.do(trainer, "train", uid=f"{server}.0")
    assert result.get("equal"), result
    assert result["seconds"] < 15.0
    noticed = result["error"] or "without an error"
    print(f"{server} <- {trainer}, the NAT of {victim} forgot: {result['seconds']:.1f} s, {noticed}")


@pytest.mark.slow
def test_a_punched_way_that_loses_packets_gives_the_right_bytes(stem: Stem, tmp_path: Path) -> None:
    """One of fifty packets is lost, from the first one on: the hole is punched, and megabytes come back right."""
    hosts = {"r1": "public", "sk": "keeping", "tk": "keeping"}
    with Lab(hosts) as lab, Swarm(stem, lab, tmp_path, public=("r1",)) as swarm:
        swarm.start(("r1",))
        swarm.start(("sk",))
        swarm.do("sk", "serve", uid="e.0", width=1024)
        swarm.start(("tk",))
        lab.lose("tk", 2)
        result = swarm.do("tk", "train", uid="e.0", rows=512, width=1024)
        assert result["error"] == "" and result["equal"]
        assert {text.partition(" ")[0] for text in result["paths"][swarm.peer_ids["sk"]]} == {"datachannel"}
        print(f"2 % lost: 2 MiB forward and back, and the gradients, in {result['seconds']:.1f} s")


def test_a_killed_relay_is_replaced(swarm: Swarm) -> None:
    """The relay in use gets SIGKILL, which was also a rendezvous node: another one takes over within 15 s."""
    before = swarm.do("ts", "train", uid="ss.0")
    assert before["equal"]
    [path] = {text for text in before["paths"][swarm.peer_ids["ss"]] if text.startswith("relay")}
    host = path.removeprefix("relay ").partition(":")[0]
    [relay] = [name for name, place in swarm.lab.hosts.items() if place.address == host]
    swarm.kill(relay)
    result = swarm.do("ts", "train", uid="ss.0")
    assert result.get("equal"), result
    assert result["seconds"] < 15.0
    assert host not in str(result["paths"][swarm.peer_ids["ss"]])
    print(f"relay killed: {result['seconds']:.1f} s")


@pytest.mark.slow
def test_a_better_path_is_found_later(stem: Stem, tmp_path: Path) -> None:
    """Where only the DHT's UDP passes, the relay is taken; once all passes, new calls go through a punched hole."""
    hosts = {"r1": "public", "r2": "public", "sk": "keeping", "tk": "keeping"}
    with Lab(hosts) as lab, Swarm(stem, lab, tmp_path, public=("r1", "r2")) as swarm:
        for names in (("r1", "r2"), ("sk",), ("tk",)):
            swarm.start(names)
        swarm.do("sk", "serve", uid="e.0")
        lab.block_udp("tk", blocked=True, but=31337)
        first = swarm.do("tk", "train", uid="e.0")
        assert first["equal"]
        assert [path.partition(" ")[0] for path in first["paths"][swarm.peer_ids["sk"]]] == ["relay"]
        lab.block_udp("tk", blocked=False, but=31337)
        deadline = time.monotonic() + 45
        kinds = ["relay"]
        while kinds[0] != "datachannel" and time.monotonic() < deadline:
            time.sleep(0.5)
            later = swarm.do("tk", "train", uid="e.0")
            assert later["equal"] and not later["error"], "the change of paths disturbed a call"
            kinds = [path.partition(" ")[0] for path in later["paths"][swarm.peer_ids["sk"]]]
        assert kinds[0] == "datachannel"


def test_fifty_clients_on_one_rendezvous_node(stem: Stem, tmp_path: Path) -> None:
    hosts = {"r1": "public", "tp": "public", "m": "keeping"}
    with Lab(hosts) as lab, Swarm(stem, lab, tmp_path, public=("r1",)) as swarm:
        swarm.start_only("r1")
        before = resident_bytes(swarm.pid("r1"))
        crowd = swarm.do("m", "crowd", count=50, seed=f"{lab.hosts['r1'].address}:31337")
        via = f"{lab.hosts['r1'].address}:31337/{swarm.peer_ids['r1']}"
        swarm.start(("tp",))  # at last, or the crowd would have dialed it, as another public node
        result = swarm.do("tp", "call_crowd", peer_ids=crowd, via=via)
        grown = resident_bytes(swarm.pid("r1")) - before
        assert "reverse" in result["kinds"]
        assert swarm.do("r1", "metrics")["rendezvous_clients"] == 50
        assert grown < 50 * 2**20 / 2, "the rendezvous keeps more than half a megabyte per client"
        print(f"50 clients: slowest call {result['slowest']:.2f} s, rendezvous grew by {grown / 2**20:.1f} MiB")


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
