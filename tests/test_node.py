"""TesseractNode: binding, addresses, routing expert calls by uid, and calls to oneself."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

import tesseract_async as ta
from tesseract_async import errors
from tesseract_async.admission import Policy
from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.experts.node_calls import EXPERT_METHODS
from tesseract_async.identity import PeerID
from tesseract_async.network.network import ASK_OTHERWISE_AFTER
from tesseract_async.network.settings import NetworkSettings
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import frames
from tesseract_async.wire.apply import APPLY
from tesseract_async.wire.messages import BACKWARD, FORWARD, INFO, TAKE_OVER
from tests.faults.serving import let_pass

pytestmark = pytest.mark.both_loops


async def echo(call: IncomingCall) -> Message:
    return Message({"uid": call.body[0], "from": bytes(call.peer_id)}, call.buffers)


async def test_udp_and_tcp_share_the_port_and_the_default_host_is_loopback() -> None:
    async with ta.TesseractNode() as node:
        host, port = node.address.split(":")
        assert host == "127.0.0.1"
        assert node.peer_address.addresses == (node.address,)
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with socket.socket(socket.AF_INET, kind) as sock, pytest.raises(OSError):
                sock.bind((host, int(port)))


async def test_a_port_in_use_is_a_sentence() -> None:
    async with ta.TesseractNode() as node:
        port = int(node.address.split(":")[1])
        with pytest.raises(OSError, match=f"port {port} on 127.0.0.1 is in use: choose another"):
            await ta.TesseractNode(port=port).start()


async def test_a_foreign_host_is_a_sentence() -> None:
    with pytest.raises(OSError, match="no address of this machine"):
        await ta.TesseractNode(host="192.0.2.7").start()


def test_an_address_as_it_is_written_is_a_seed() -> None:
    peer = PeerAddress(PeerID(bytes([1]) * 32), ("1.2.3.4:5", "[2606:4700::1]:5"))
    assert str(peer) == f"1.2.3.4:5/{peer.peer_id},[2606:4700::1]:5/{peer.peer_id}", "each pinned to the id"
    assert PeerAddress.parse(str(peer)) == peer
    seeds = ta.TesseractNode(initial_peers=[str(peer), f"1.2.3.5:5, 1.2.3.6:5/{peer.peer_id}"]).initial_peers
    assert [seed.addresses for seed in seeds] == [("1.2.3.4:5",), ("[2606:4700::1]:5",), ("1.2.3.5:5",), ("1.2.3.6:5",)]
    assert [seed.peer_id for seed in seeds] == [peer.peer_id, peer.peer_id, None, peer.peer_id]
    with pytest.raises(ValueError, match="different peers"):
        PeerAddress.parse(f"1.2.3.5:5,1.2.3.6:5/{peer.peer_id}")


@pytest.mark.parametrize("seed", ["nonsense", "1.2.3.4", "1.2.3.4:99999", "1.2.3.4:5/short", "1.2.3.4:5,", ""])
def test_a_malformed_seed_is_refused_at_once(seed: str) -> None:
    with pytest.raises(ValueError):
        ta.TesseractNode(initial_peers=[seed])


@pytest.mark.parametrize(
    ("seeds", "sentence"),
    [
        ("192.0.2.1:1", "initial_peers is a list of addresses"),
        (b"192.0.2.1:1", "initial_peers is a list of addresses"),
        (None, "initial_peers is a list of addresses"),
        (("192.0.2.1", 1), "not an address"),
        ([("192.0.2.1", 1)], "each of initial_peers is a string"),
        ([None], "each of initial_peers is a string"),
        (["/ip4/192.0.2.1/tcp/1/p2p/Qm"], "host:port/PEER_ID, not a multiaddr"),
        (["tcp://192.0.2.1:1"], "not a URL"),
    ],
)
def test_what_is_no_list_of_seeds_is_told_what_one_is(seeds: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ta.TesseractNode(initial_peers=seeds)


async def test_before_start_there_is_no_address() -> None:
    with pytest.raises(RuntimeError, match="before it is started"):
        ta.TesseractNode().address  # noqa: B018


async def test_start_twice_is_refused_and_close_twice_is_not() -> None:
    async with ta.TesseractNode() as node:
        with pytest.raises(RuntimeError, match="started before"):
            await node.start()
    await node.aclose()


async def test_a_failed_start_frees_the_port() -> None:
    class Down(ta.TesseractNetwork):
        async def start(self, *args: object, **kwargs: object) -> None:
            raise OSError("no network today")

    node = ta.TesseractNode()
    node.network = Down(identity=node.identity)
    with pytest.raises(OSError, match="no network today"):
        await node.start()
    port = int(node.address.split(":")[1])
    async with ta.TesseractNode(port=port):
        pass


async def test_calls_reach_the_expert_of_their_uid_here_and_from_afar() -> None:
    async with ta.TesseractNode() as host, ta.TesseractNode(initial_peers=[host.address]) as guest:
        host.host_expert("e.1", dict.fromkeys(EXPERT_METHODS, echo))
        with pytest.raises(ValueError, match=r"hosts e\.1 already"):
            host.host_expert("e.1", dict.fromkeys(EXPERT_METHODS, echo))
        for caller in (host, guest):
            data = bytearray(b"payload")
            reply = await caller.call_expert(host.peer_address, FORWARD, ["e.1"], [data], timeout=30)
            assert reply.body == {"uid": "e.1", "from": bytes(caller.peer_id)}
            data[:] = b"changed"
            assert bytes(reply.buffers[0]) == b"payload"
            with pytest.raises(errors.ExpertNotFound, match=r"e\.2"):
                await caller.call_expert(host.peer_address, INFO, ["e.2"], timeout=30)
            with pytest.raises(errors.ExpertNotFound):
                await caller.call_expert(host.peer_address, INFO, {"no": "list"}, timeout=30)
            with pytest.raises(errors.UnknownMethod, match="expert.nothing"):
                await caller.call_expert(host.peer_address, "expert.nothing", ["e.1"], timeout=30)
            with pytest.raises(ValueError, match="priority"):  # also on the way to itself
                await caller.call_expert(host.peer_address, INFO, ["e.1"], timeout=30, priority=1000)
        host.unhost_expert("e.1")
        with pytest.raises(errors.ExpertNotFound):
            await guest.call_expert(host.peer_address, FORWARD, ["e.1"], timeout=30)


async def test_many_experts_are_found_and_counted_each() -> None:
    async with ta.TesseractNode(policy=Policy(trainers=set())) as host:
        for uid in ("e.0", "e.1"):
            host.host_expert(uid, {APPLY: echo})
        peer = PeerID(bytes([1]) * 32)

        def find(method: str) -> list[object]:
            call = IncomingCall(peer_id=peer, method=method, body=None, buffers=(), deadline=1e9, priority=0)
            return [type(one) for one in host.find_experts(call, ["e.0", "e.2", "e.1"]) if one is not echo]

        assert find(FORWARD) == [errors.ExpertNotFound]
        assert host.metrics.total("expert_calls_answered") == 2
        assert find(BACKWARD) == [errors.NotAllowed, errors.ExpertNotFound, errors.NotAllowed]
        assert host.metrics.total("expert_calls_answered") == 2


async def test_errors_timeouts_and_cancellation_are_alike_here_and_from_afar() -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def handler(call: IncomingCall) -> Message:
        if call.body[1] == "fail":
            raise KeyError("lost")
        if call.body[1] == "refuse":
            raise errors.Overloaded("full", retry_after=1.5)
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return Message()

    async with ta.TesseractNode() as host, ta.TesseractNode(initial_peers=[host.address]) as guest:
        host.host_expert("e.1", dict.fromkeys(EXPERT_METHODS, handler))
        for caller in (host, guest):

            async def call(how: str, timeout: float = 30, caller: ta.TesseractNode = caller) -> Message:
                return await caller.call_expert(host.peer_address, FORWARD, ["e.1", how], timeout=timeout)

            with pytest.raises(errors.RemoteError, match="lost"):
                await call("fail")
            with pytest.raises(errors.Overloaded) as caught:
                await call("refuse")
            assert caught.value.retry_after == 1.5
            with pytest.raises(TimeoutError):
                await call("hang", timeout=0.05)
            await asyncio.wait_for(cancelled.wait(), 30)
            started.clear()
            cancelled.clear()
            task = asyncio.create_task(call("hang"))
            await asyncio.wait_for(started.wait(), 30)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(cancelled.wait(), 30)


async def test_handing_an_expert_over_is_for_those_who_may_store() -> None:
    server, trainer = ta.Identity.generate(), ta.Identity.generate()
    both = frozenset({server.peer_id, trainer.peer_id})
    policy = Policy(callers=both, trainers=frozenset({trainer.peer_id}), hosts=frozenset({server.peer_id}))
    async with (
        ta.TesseractNode(policy=policy) as host,
        ta.TesseractNode(identity=server) as serving,
        ta.TesseractNode(identity=trainer) as training,
    ):
        host.host_expert("ffn.0", dict.fromkeys(EXPERT_METHODS, echo))

        async def ask(node: ta.TesseractNode, method: str) -> Message:
            return await node.call_expert(host.peer_address, method, ["ffn.0"], timeout=30.0)

        for node, allowed, refused, action in (
            (serving, TAKE_OVER, BACKWARD, "train"),
            (training, BACKWARD, TAKE_OVER, "host"),
        ):
            await ask(node, allowed)
            await ask(node, FORWARD)
            with pytest.raises(errors.NotAllowed, match=f"does not let .* {action}"):
                await ask(node, refused)


async def test_an_unknown_uid_is_named() -> None:
    async with ta.TesseractNode() as node:
        with pytest.raises(errors.ExpertNotFound, match=r"ffn\.3\.7"):
            await node.get_expert("ffn.3.7")
        with pytest.raises(ValueError):
            await node.get_expert("no uid")


async def test_listening_everywhere_announces_an_address_that_others_can_dial() -> None:
    async with ta.TesseractNode() as seed, ta.TesseractNode("0.0.0.0", initial_peers=[seed.address]) as node:
        assert node.peer_address.addresses[0].startswith("127.0.0.1:")
    async with ta.TesseractNode("0.0.0.0", announce="203.0.113.5:4000") as node:
        assert node.peer_address.addresses == ("203.0.113.5:4000",)


async def test_a_node_on_loopback_says_that_seeds_elsewhere_are_out_of_its_reach(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with ta.TesseractNode() as seed, ta.TesseractNode(initial_peers=[seed.address, "localhost:9"]):
        assert not caplog.records
    async with ta.TesseractNode(initial_peers=[seed.address, "198.51.100.7:31337"]):
        (said,) = [record.getMessage() for record in caplog.records if "this computer only" in record.getMessage()]
        assert "198.51.100.7:31337" in said and seed.address not in said and "--host 0.0.0.0" in said


@pytest.mark.parametrize(
    ("hello", "said"),
    [
        (b"TSRA\x00\x07" + frames.pack({"from": "the future"}), "the peer speaks wire version 7, this node 2: upgrade"),
        (None, "Does a node run there"),
    ],
    ids=["another version", "nobody"],
)
async def test_a_seed_that_is_silent_by_udp_is_asked_by_tcp(hello: bytes | None, said: str) -> None:
    """An old version takes no datagram for one: only its hello tells."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if hello is not None:
            writer.write(frames.frame(frames.HELLO, payload=hello))
            await reader.read()
        writer.close()

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        async with await asyncio.start_server(greet, "127.0.0.1", 0) as listener:
            port = listener.sockets[0].getsockname()[1]
            silent.bind(("127.0.0.1", port))
            async with ta.TesseractNode(initial_peers=[f"127.0.0.1:{port}"], security="plain") as node:
                await asyncio.sleep(0)  # it has asked by UDP
                let_pass(ASK_OTHERWISE_AFTER)
                async with asyncio.timeout(30):
                    while said not in str(node.network.trouble):  # noqa: ASYNC110 (nothing announces it)
                        await asyncio.sleep(0.01)


async def test_where_no_seed_answers_that_an_expert_is_absent_is_not_said() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        seed = f"127.0.0.1:{silent.getsockname()[1]}"
        async with ta.TesseractNode(initial_peers=[seed]) as node:
            node.network.settings = NetworkSettings(join_timeout=0.05)
            with pytest.raises(TimeoutError, match=f"no answer from {seed}"):
                await node.get_expert("ffn.0.0")


async def test_a_node_with_an_identity_file_finds_the_network_again_without_its_seed(tmp_path: Path) -> None:
    async with ta.TesseractNode() as other:

        async def visit(seed: str, known: int) -> None:
            async with ta.TesseractNode(identity=tmp_path / "node.pem", initial_peers=[seed]) as node:
                async with asyncio.timeout(30):
                    while node.network.num_contacts < known:  # noqa: ASYNC110 (nothing announces it)
                        await asyncio.sleep(0)
                assert known or not await node.network.wait_joined(0.1)

        async with ta.TesseractNode(initial_peers=[other.address]) as first:
            seed = first.address
            await visit(seed, 2)
            (peers,) = tmp_path.glob("*.peers")  # noqa: ASYNC240  (once)
            peers.write_bytes(b"\xff nonsense")
            await visit(seed, 2)
            assert str(other.peer_id) in peers.read_text()
            peers.unlink()
            peers.mkdir()  # so it can be neither read nor written
            await visit(seed, 2)
            peers.rmdir()
            await visit(seed, 2)
        await visit(seed, 1)
        await visit("127.0.0.1:9", 0)  # another swarm, with which this one has nothing to do
