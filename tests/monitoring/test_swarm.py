"""The observer and the dashboard in front of a real, small swarm."""

import asyncio
import io
import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import torch
from rich.console import Console

import tesseract_async as ta
from tesseract_async.cli import swarm_picture as picture
from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import ExpertFailed, PeerUnreachable
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.places import MemberPart, MemberRole, Place
from tesseract_async.experts.run import SignedRun
from tesseract_async.identity import PeerID
from tesseract_async.monitoring import StatusService, SwarmObserver, publish_progress
from tesseract_async.monitoring.dashboard import PAGE, Dashboard
from tesseract_async.monitoring.observer import SHOW_DEAD_FOR, THANKS_EVERY
from tesseract_async.monitoring.prometheus import render
from tesseract_async.monitoring.status import METHOD
from tesseract_async.transport.base import PeerAddress
from tests.faults.serving import let_pass
from tests.scripted_node import Instead
from tests.server.run_members import joined, make_run, say

pytestmark = pytest.mark.both_loops


def backend() -> ta.ExpertBackend:
    module = torch.nn.Linear(2, 2)
    return ta.ExpertBackend(
        module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), args_schema=(ta.TensorSpec((2,)),)
    )


@asynccontextmanager
async def volunteer(*uids: str, seeds: tuple[str, ...] = ()) -> AsyncIterator[ta.TesseractNode]:
    async with (
        ta.TesseractNode(initial_peers=seeds) as node,
        ta.TesseractServer(node, {uid: backend() for uid in uids}) as server,
        StatusService(node, server, name="attic"),
    ):
        yield node


def only(items: list[Any]) -> Any:
    [item] = items
    return item


async def test_an_observer_sees_who_hosts_computes_and_leaves() -> None:
    async with ta.TesseractNode() as seed, StatusService(seed):
        seeds = (seed.address,)
        async with ta.TesseractNode(initial_peers=seeds, refresh_period=0.2) as node:
            observer = SwarmObserver(node, patterns=[ExpertPattern.parse("ffn.[0:2].[0:3]")], period=30.0)
            async with volunteer("ffn.0.0", "ffn.1.2", seeds=seeds) as host:
                await node.directory.wait_warm("ffn")
                await node.directory.refresh("ffn")
                await observer.look()
                expert = await node.get_expert("ffn.1.2")
                for _ in range(3):
                    await ta.backward((await expert(torch.ones(5, 2))).sum())
                host.metrics.count("answers_left_out", way="backward", reason="late")
                await publish_progress(host, "ffn", step=3, loss=0.5, seen=15, unit="tokens", trainer="one")
                await publish_progress(host, "ffn", step=3, loss=0.25, trainer="merged")
                await observer.look()
                state, told = json.loads(json.dumps(observer.state())), observer.peers[host.peer_id].status
                assert told is not None
                grid = only(state["grids"])
                assert grid["size"] == [2, 3]
                assert [(cell[0], cell[2], cell[3]) for cell in grid["experts"]] == [([0, 0], 1, 0), ([1, 2], 1, 3)]
                peer = only(state["peers"])
                assert peer["peer_id"] == str(host.peer_id) and peer["name"] == "attic" and told.num_parameters == 6
                assert "cores" in peer["hardware"] and peer["memory"] > 0 and peer["left_ago"] is None
                page = observer.expert("ffn.1.2")
                assert only(page["servers"])["num_calls"] == 6 and only(page["servers"])["slow_seconds"] > 0
                assert only(page["versions"])[1] in (0, 3)
                assert [one["uid"] for one in observer.server(host.peer_id)["experts"]] == ["ffn.0.0", "ffn.1.2"]
                await publish_progress(node, "ffn", step=3, loss=0.5, trainer="two")
                let_pass(THANKS_EVERY)
                await observer.read_thanks()
                thanked = only(observer.contributors())
                assert (thanked["name"], thanked["rows"], thanked["steps"]) == ("attic", 15, 3)
                text = render(node.metrics, observer).decode()
                at = f'expert="ffn.1.2",server="{host.peer_id}"'
                assert f"tesseract_swarm_expert_calls_total{{{at}}} 6.0" in text
                assert f"tesseract_swarm_expert_rows_total{{{at}}} 30.0" in text
                assert f'tesseract_swarm_server_up{{name="attic",server="{host.peer_id}"}} 1.0' in text
                assert f'tesseract_swarm_thanks_rows{{name="attic",server="{host.peer_id}"}} 15.0' in text
                assert peer["steps_per_second"] > 0 and peer["rows_per_second"] > 0
                assert peer["num_experts"] == 2 and peer["error"] is None and peer["path"]
                assert state["totals"]["experts"] == 2 and state["totals"]["loss"] == 0.5
                assert only(list(state["losses"].values())) == [3, 0.5, 1, 15, "tokens"]
                assert state["seen"] == {"tokens": 15} and state["totals"]["merged"] == 0.25
                assert "tesseract_swarm_merged_loss 0.25" in text and 'one",unit="tokens"} 15.0' in text
                assert only(state["log"])[1:] == [f"attic ({host.peer_id.short}) joined with 2 experts", "joined"]
                assert (
                    peer["calls_per_second"] > 0
                    and peer["answered_ago"] >= 0
                    and state["totals"]["calls_per_second"] > 0
                )
                shown = print_top(state, 132)
                assert all(column in shown for column in picture.COLUMNS)
                assert "attic" in shown
                for width, name in ((80, "attic  "), (40, "")):  # whose line it is, and the path: always whole
                    assert f"{host.peer_id.short}  {name}{peer['path']}  " in print_top(state, width)
                [head] = [one for one in print_top(state, 80).splitlines() if one.startswith("peer ")]
                assert head.split() == ["peer", "name", "path", "round", "trip", "experts", "calls/s", "load"]
                assert host.peer_id.short in shown and "2 experts on 1 server " in shown and "●" in shown
            await observer.look()
            state = observer.state()
            assert state["peers"] == [] and only(state["grids"])["experts"] == []
            assert "left with 2 experts" in state["log"][-1][1] and state["log"][-1][2] == "left"
            assert only(state["grids"])["lost"] == [[0, 0], [1, 2]]


def print_top(state: dict[str, Any], width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(picture.draw(state, width))
    return console.export_text()


async def test_without_patterns_the_neighbors_grids_are_found() -> None:
    async with (
        volunteer("ffn.0.3", "attention.1") as host,
        ta.TesseractNode(initial_peers=[host.address], refresh_period=0.2) as node,
    ):
        await node.network.wait_joined(30)
        observer = SwarmObserver(node, period=30.0)
        await observer.look()
        for prefix in ("ffn", "attention"):
            await node.directory.wait_warm(prefix)
        await observer.look()
        assert {grid["prefix"]: grid["size"] for grid in observer.state()["grids"]} == {"ffn": [1, 4], "attention": [2]}
        assert only(observer.state()["peers"])["num_experts"] == 2


async def test_a_grid_that_grows_is_shown_whole() -> None:
    async with (
        volunteer("ffn.0.3") as first,
        ta.TesseractNode(initial_peers=[first.address], refresh_period=0.2) as node,
    ):
        await node.network.wait_joined(30)
        observer = SwarmObserver(node, period=0.5)
        await observer.look()
        assert only(observer.state()["grids"])["size"] == [1, 4]
        async with volunteer("ffn.2.0", seeds=(first.address,)) as second, asyncio.timeout(60):
            while second.peer_id not in observer.peers:
                await observer.look()
                await asyncio.sleep(0.1)
            grid = only(observer.state()["grids"])
            assert grid["size"] == [3, 4] and [cell[0] for cell in grid["experts"]] == [[0, 3], [2, 0]]


async def test_a_program_that_tells_no_figures_is_there_all_the_same() -> None:
    async with (
        ta.TesseractNode() as host,
        ta.TesseractServer(host, {"ffn.0": backend()}),  # without a StatusService
        ta.TesseractNode(initial_peers=[host.address]) as node,
    ):
        observer = SwarmObserver(node, patterns=[ExpertPattern.parse("ffn.0")], period=30.0)
        await node.directory.wait_warm("ffn")
        for _ in range(3):
            await observer.look()
        peer = only(observer.state()["peers"])
        assert peer["error"] is None and not peer["gone"] and peer["answered_ago"] is not None
        assert observer.state()["totals"]["experts"] == 1
        assert not [sentence for _, sentence, _ in observer.log if "answer" in sentence]


async def test_a_dead_server_counts_no_more_and_is_shown_for_a_while() -> None:
    async def dead(*_: object, **__: object) -> object:
        raise PeerUnreachable("x", {"tcp 127.0.0.1:1": ConnectionRefusedError(111, "Connect call failed")})

    async with ta.TesseractNode() as seed, ta.TesseractNode(initial_peers=[seed.address]) as node:
        async with volunteer("ffn.0.0", "ffn.0.1", seeds=(seed.address,)) as host:
            seen: Any = Instead(node, endpoint=Instead(node.endpoint))
            observer = SwarmObserver(seen, patterns=[ExpertPattern.parse("ffn.[0:1].[0:2]")], period=30.0)
            await node.directory.wait_warm("ffn")
            await observer.look()
            assert observer.state()["totals"]["experts"] == 2
            seen.endpoint.call = dead
            await observer.look()
            state = observer.state()
            assert len(only(state["grids"])["experts"]) == 2, "its manifests have not expired"
            assert state["totals"]["experts"] == state["totals"]["servers"] == 0
            assert only(state["peers"])["gone"] and only(state["peers"])["error"] == "it cannot be reached"
            assert host.peer_id.short in state["log"][-1][1] and "Errno" not in state["log"][-1][1]
        for _ in range(2):
            await observer.look()
        state = observer.state()
        assert only(state["peers"])["error"] and only(state["peers"])["num_experts"] == 0
        assert [line for line in state["log"] if line[2] == "left"][1:] == []
        let_pass(SHOW_DEAD_FOR + 1.0)
        await observer.look()
        assert observer.state()["peers"] == []


class Hosted(list[int]):
    """A view of a grid whose experts one server hosts."""

    @property
    def coords(self) -> torch.Tensor:
        return torch.tensor(self).reshape(-1, 1)

    def replicas_at(self, row: int) -> list[Any]:
        address = PeerAddress(PeerID(bytes(32)), ("127.0.0.1:1",))
        return [SimpleNamespace(peer=address, uid=f"ffn.{self[row]}")]


class Grids:
    """A directory that finds the first of some views of a grid."""

    def __init__(self, views: list[Hosted]) -> None:
        self.views = views

    def watch(self, *_: object) -> None:
        pass

    def live(self, *_: object) -> Hosted:
        return self.views[0]

    async def refresh(self, prefix: str) -> None:
        pass


async def test_an_event_says_what_a_server_took_and_gave_up() -> None:
    views = [Hosted([0, 1]), Hosted([0, 1, 2]), Hosted([0, 5, 6]), Hosted([5])]
    async with ta.TesseractNode() as node:
        seen: Any = Instead(node, directory=Grids(views))
        observer = SwarmObserver(seen, patterns=[ExpertPattern.parse("ffn.[0:9]")], period=0.5)
        while views:
            await observer.look()
            del views[0]
    said = [sentence.partition(" ")[2] for _, sentence, kind in observer.log if kind == "changed"]
    assert said == ["took 1 expert: 3 now", "took 2 experts and gave 2 experts up: 3 now", "gave 2 experts up: 1 now"]


async def placed(run: SignedRun, seed: ta.TesseractNode) -> PeerID:
    """A member that led an expert and died: its place is there still."""
    async with joined(run, 60, [seed.address]) as member:
        await say(member, Place(member.peer_id, 1, 1, parts={"ffn.0": MemberPart(MemberRole.PRIMARY, number=1)}))
        return member.peer_id


async def test_one_look_misses_a_member_of_a_run_that_died_before_it() -> None:
    run = make_run(1)
    async with ta.TesseractNode() as node:
        await node.join_run(run)
        dead = await placed(run, node)
        observer = SwarmObserver(node, patterns=[run.manifest.pattern], period=30.0)
        await observer.look()
        await observer.look()
        (line,) = observer.log
        assert line[1].startswith(f"{dead.short} should lead an expert, and is not found") and line[2] == "failed"


async def test_an_expert_that_no_member_has_any_more_is_lost() -> None:
    run, views = make_run(2), [Hosted([1, 7]), Hosted([])]  # one that the run has, and one that a member only names
    async with ta.TesseractNode() as node:
        await node.join_run(run)
        await placed(run, node)
        seen: Any = Instead(node, directory=Grids(views))
        observer = SwarmObserver(seen, patterns=[run.manifest.pattern], period=0.5)
        await observer.look()
        del views[0]
        await observer.look()
        state = observer.state()
        assert (state["run"]["losses"], state["run"]["at_risk"]) == (-1, 2)
        assert [[1], None, [], [], 0, -1, "lost"] in only(state["grids"])["standings"]


async def test_the_dashboard_serves_the_page_the_state_and_the_metrics() -> None:
    async with ta.TesseractNode() as node:
        node.metrics.count("expert_calls", method="expert.forward")
        observer = SwarmObserver(node, period=0.05)
        async with observer, Dashboard(observer) as page, aiohttp.ClientSession() as browser:
            assert page.url.startswith("http://127.0.0.1:") and page.token is None
            for path, kind in (
                ("", "text/html"),
                ("style.css", "text/css"),
                ("page.js", "text/javascript"),
                ("icon.svg", "image/svg+xml"),
            ):
                async with browser.get(page.url + path) as answer:
                    assert answer.status == 200 and answer.content_type == kind
                    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
            async with browser.get(page.url + "api/state") as answer:
                assert (await answer.json())["node"]["peer_id"] == str(node.peer_id)
            async with browser.get(page.url + "metrics") as answer:
                assert 'tesseract_expert_calls_total{method="expert.forward"} 1.0' in await answer.text()
            async with browser.get(page.url + "api/events") as answer:
                assert answer.content_type == "text/event-stream"
                for number in range(3):
                    message = json.loads((await answer.content.readline()).removeprefix(b"data: "))
                    assert message["grids"] == [] and message["whole"] is (number == 0)
                    points = sum(map(len, message["history"].values()))
                    assert points <= 3, "what was sent is not sent again"
                    await answer.content.readline()
            async with browser.get(page.url, headers={"Host": "evil.example"}) as answer:
                assert answer.status == 403, "a page elsewhere must not read this one under its own name"
            async with browser.get(page.url + "../../status.py") as answer:
                assert answer.status == 404
    assert sum(file.stat().st_size for file in PAGE.iterdir()) < 300_000


async def test_beyond_loopback_a_token_is_asked_for() -> None:
    async with ta.TesseractNode() as node:
        observer = SwarmObserver(node)
        async with Dashboard(observer, host="0.0.0.0") as page, aiohttp.ClientSession() as browser:
            assert page.token is not None and page.token in page.url
            at = page.url.replace("0.0.0.0", "127.0.0.1").partition("?")[0]
            for wrong in ("", "?token=", "?token=guess"):
                async with browser.get(at + "api/state" + wrong) as answer:
                    assert answer.status == 403
            async with browser.get(at + "metrics", headers={"Authorization": f"Bearer {page.token}"}) as answer:
                assert answer.status == 200
            async with browser.get(f"{at}?token={page.token}", allow_redirects=False) as answer:
                assert (answer.status, answer.headers["Location"]) == (303, "./")
                cookie = answer.cookies["tesseract_token"]
                assert cookie["httponly"] and cookie["samesite"] == "Strict"
            async with browser.get(at + "api/state", cookies={"tesseract_token": page.token}) as answer:
                assert answer.status == 200


async def test_a_port_in_use_is_a_sentence() -> None:
    async with ta.TesseractNode() as node:
        observer = SwarmObserver(node)
        async with Dashboard(observer) as page:
            port = int(page.url.rpartition(":")[2].strip("/"))
            with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1 port {port}"):
                await Dashboard(observer, port=port).__aenter__()


async def test_what_strangers_publish_is_bounded() -> None:
    """A grid too large to draw, losses that JSON does not know, endless sentences."""
    async with volunteer("wide.99999.99999", "ffn.0") as host:
        for number, value in enumerate(
            (
                [1, math.nan, 0, 0, "samples"],
                [1, math.inf, 0, 0, "samples"],
                [2**60, 1.0, 0, 0, "samples"],
                ["x", 1.0, 0, 0, "samples"],
                [3, 0.5, -1, 0, "samples"],
                [3, 0.5, 0, 0],
                7,
                None,
                [3, 0.5, 2, -1, "samples"],
                [3, 0.5, 2, 7, "pages"],
                [3, 1.7e308, 2, 7, "tokens"],
                [3, 0.5, 2, 7, "tokens", "of a later version"],
            )
        ):
            await host.network.store("progress/ffn", value, ttl=60.0, subkey=str(number))
        async with ta.TesseractNode(initial_peers=[host.address], refresh_period=0.2) as node:
            await node.network.wait_joined(30)
            observer = SwarmObserver(node, period=30.0)
            await observer.look()
            await node.directory.wait_warm("ffn")
            await observer.look()
            state = json.loads(json.dumps(observer.state(), allow_nan=False))
            assert [grid["prefix"] for grid in state["grids"]] == ["ffn"]
            assert list(state["losses"].values()) == [[3, 0.5, 2, 7, "tokens"]]
            for subkey in ("\x1b[2J\u202eevil", "x" * 128):
                await host.network.store("progress/ffn", [3, 0.5, 2, 7, "tokens"], ttl=60.0, subkey=subkey)
            await observer.look()
            names = [name.split(maxsplit=1)[1] for name in observer.losses]
            assert "\\x1b[2J\\u202eevil" in names and max(map(len, names)) == 48


async def test_what_a_server_answers_with_is_cut() -> None:
    async def wordy(call: IncomingCall) -> Message:
        raise ExpertFailed("x" * 10_000)

    async with volunteer("ffn.0") as host, ta.TesseractNode(initial_peers=[host.address]) as node:
        host.endpoint.unhandle(METHOD)
        host.endpoint.handle(METHOD, wordy)
        observer = SwarmObserver(node, patterns=[ExpertPattern.parse("ffn.[0:1]")], period=30.0)
        await node.directory.wait_warm("ffn")
        await observer.look()
        assert "xxx" in observer.log[-1][1] and len(observer.log[-1][1]) == 240


def test_a_period_is_positive() -> None:
    with pytest.raises(ValueError, match="period"):
        SwarmObserver(None, period=0)  # type: ignore[arg-type]


async def test_with_a_list_nobody_else_is_asked_or_shown() -> None:
    async with volunteer("ffn.0") as member, volunteer("ffn.1", "att.0", seeds=(member.address,)) as stranger:
        policy = ta.Policy.only([member.peer_id])
        async with ta.TesseractNode(initial_peers=[member.address], policy=policy, refresh_period=0.2) as node:
            await publish_progress(stranger, "ffn", step=3, loss=0.5, trainer="one")
            async with asyncio.timeout(30):
                while stranger.peer_id not in {one.peer_id for one in node.network.public_contacts(20)}:
                    await node.network.get("anything")  # by which it meets the others
            observer = SwarmObserver(node, period=30.0)
            await observer.look()
            await observer.look()
            assert list(observer.peers) == [member.peer_id] and not observer.losses
            assert not node.is_connected(stranger.peer_id)


async def test_in_a_run_only_trainers_that_may_train_are_shown() -> None:
    run = make_run(1)
    async with ta.TesseractNode() as seed, joined(run, 5, [seed.address]) as trainer:
        async with ta.TesseractNode(initial_peers=[seed.address], refresh_period=0.2) as viewer:
            await viewer.network.wait_joined(30)
            await viewer.join_run(run)
            trainer.thanks.add("ffn", seed.peer_id, 3, 1)  # so that it shows its grant
            await publish_progress(trainer, "ffn", step=3, loss=0.5, seen=64)
            await publish_progress(seed, "ffn", step=10**6, loss=99.0, seen=10**9)
            observer = SwarmObserver(viewer, patterns=[run.manifest.pattern], period=30.0)
            await observer.read_thanks()
            await observer.look()
            assert [one.step for one in observer.losses.values()] == [3]
            assert observer.state()["seen"] == {"samples": 64}
