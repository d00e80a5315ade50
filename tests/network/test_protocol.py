"""The machine, fed by function calls: what it sends, believes, refuses and counts."""

import random
from typing import Any

import pytest

from tesseract_async.admission import Policy
from tesseract_async.identity import Identity, SignedRecord
from tesseract_async.metrics import Metrics
from tesseract_async.network import datagrams as wire
from tesseract_async.network.address_scope import AddressScope
from tesseract_async.network.contacts import V4_BYTES, V6_BYTES, Address, Contact, pack_address, pack_contacts
from tesseract_async.network.core import MAX_REQUEST_RATE
from tesseract_async.network.dial_back import MAX_ERRANDS
from tesseract_async.network.events import ClockSkewed, Isolated, Joined, NodeRoleChanged, ReadFinished, WriteFinished
from tesseract_async.network.protocol import REFRESH_PERIOD, NetworkProtocol, Tokens
from tesseract_async.network.reading import PAGES_IN_PROGRESS
from tesseract_async.network.rpcs import MAX_CALLS, Call, Caller
from tesseract_async.network.settings import NetworkSettings
from tesseract_async.network.storage import StoreOutcome
from tesseract_async.network.writing import SHORTEST_WAIT
from tesseract_async.testing import LyingProtocol, SimulatedNetwork

A, B, STRANGER = ("10.0.0.1", 4000), ("10.0.0.2", 4000), ("10.0.0.9", 4000)
WALL = 1_700_000_000.0
KEY = bytes(32)


def machine(
    seed: int,
    *,
    public: bool = True,
    skew: float = 0.0,
    policy: Policy = Policy(),  # noqa: B008 (frozen)
    kind: type[NetworkProtocol] = NetworkProtocol,
) -> NetworkProtocol:
    return kind(
        identity=Identity.from_seed(bytes([seed] * 32)),
        settings=NetworkSettings(),
        random=random.Random(seed),
        metrics=Metrics(),
        now=0.0,
        wall_offset=WALL + skew,
        is_declared_public=public,
        scope=AddressScope(["10.0.0.7"]),
        policy=policy,
    )


class Pair:
    """Two machines and the wire between them; nothing is sent before `exchange`."""

    def __init__(self) -> None:
        self.a = machine(1)
        self.b = machine(2)
        self.now = 0.0

    def exchange(self) -> list[tuple[bytes, Address]]:
        """Carries everything; returns what A sent."""
        sent: list[tuple[bytes, Address]] = []
        while True:
            moved = False
            for source, target, origin, address in ((self.a, self.b, A, B), (self.b, self.a, B, A)):
                for data, where in source.datagrams_to_send():
                    assert len(data) <= 1200
                    if origin == A:
                        sent.append((data, where))
                    if where == address:
                        target.receive_datagram(data, origin, self.now)
                        moved = True
            if not moved:
                return sent

    def join(self) -> None:
        self.a.membership.set_seeds([(B, None)], self.now)
        self.a.handle_timer(self.now)
        self.exchange()
        self.a.events()
        self.b.events()


def dropped(protocol: NetworkProtocol, reason: str) -> float:
    return protocol.metrics.counters.get(("network_datagrams_dropped", (("reason", reason),)), 0)


def record(
    owner: NetworkProtocol, *, sequence: int = 1, ttl: float = 600.0, size: int = 1, **more: Any
) -> SignedRecord:
    return SignedRecord.sign(owner.identity, KEY, sequence=sequence, expiration=WALL + ttl, value=bytes(size), **more)


def request(kind: int, *arguments: Any, token: bytes = b"", challenge: bytes = b"", flags: int = 0) -> bytes:
    return wire.encode_request(
        kind, flags, bytes(8), bytes([7] * 32), token=token, challenge=challenge, arguments=arguments
    )


def reply_of(protocol: NetworkProtocol) -> wire.RpcReply:
    """The next reply to the stranger, whom the machine may ping besides."""
    for data, address in protocol.datagrams_to_send():
        datagram = wire.decode(data)
        if datagram.kind & wire.REPLY:
            assert address == STRANGER
            return wire.read_reply(datagram)
    raise AssertionError("no reply")


def test_two_machines_find_each_other_and_share_values() -> None:
    pair = Pair()
    pair.a.membership.set_seeds([(B, None)], 0.0)
    pair.a.handle_timer(0.0)
    pair.exchange()
    assert Joined(1) in pair.a.events() and Joined(1) in pair.b.events()
    number = pair.a.write([record(pair.a)], 0.0)
    pair.exchange()
    assert pair.a.events() == [WriteFinished(number, [2], [0])]
    number = pair.b.read(KEY, 0.0)
    pair.exchange()
    (event,) = pair.b.events()
    assert isinstance(event, ReadFinished) and event.operation == number
    assert event.records == [record(pair.a)]


def test_a_seed_with_another_id_than_expected_is_not_joined_through() -> None:
    pair = Pair()
    pair.a.membership.set_seeds([(B, pair.a.identity.peer_id)], 0.0)
    pair.a.handle_timer(0.0)
    pair.exchange()
    assert dropped(pair.a, "wrong_id") == 1


def test_an_id_is_proven_once_and_not_in_every_rpc() -> None:
    pair = Pair()
    pair.join()
    for _ in range(3):
        pair.a.read(bytes(range(32)), 0.0)
        for data, _address in pair.a.datagrams_to_send():
            assert wire.read_request(wire.decode(data)).challenge == b""


def test_a_lost_request_is_sent_again_with_the_same_transaction_and_then_given_up() -> None:
    pair = Pair()
    pair.join()
    pair.a.read(bytes(range(32)), 0.0)
    sent = [data for data, _ in pair.a.datagrams_to_send()]
    now = 0.0
    while not any(isinstance(event, Isolated) for event in pair.a.events()):
        now = pair.a.timer_at()
        assert now < 20.0
        pair.a.handle_timer(now)
        sent += [data for data, _ in pair.a.datagrams_to_send() if wire.decode(data).kind == wire.GET]
    assert len(sent) == 3 and len(set(sent)) == 1
    assert len(pair.a.table) == 0


def test_a_node_alone_asks_its_seeds_and_old_contacts_forever_and_comes_back() -> None:
    pair = Pair()
    pair.join()
    pair.a.read(bytes(range(32)), 0.0)
    pair.a.datagrams_to_send()
    asked = 0
    while pair.now < 600.0:
        pair.now = max(pair.a.timer_at(), pair.now)
        pair.a.handle_timer(pair.now)
        asked += len(pair.a.datagrams_to_send())
    assert not pair.a.joined and asked > 10
    pair.now = pair.a.timer_at()
    while not pair.a.joined:
        pair.a.handle_timer(pair.now)
        pair.exchange()
        pair.now = pair.a.timer_at()
        assert pair.now < 1000.0
    assert len(pair.a.table) == 1


def test_a_farewell_needs_a_token() -> None:
    pair = Pair()
    pair.join()
    for token in (b"", bytes(8)):
        forged = wire.encode_request(wire.LEAVE, 0, bytes(8), pair.b.own_id, token=token, challenge=b"", arguments=())
        pair.a.receive_datagram(forged, B, 0.0)
    assert len(pair.a.table) == 1 and dropped(pair.a, "token") == 2
    # a token proves an address, not an id: nobody says farewell in another's name
    token = pair.a.tokens.give(pack_address(STRANGER))
    forged = wire.encode_request(wire.LEAVE, 0, bytes(8), pair.b.own_id, token=token, challenge=b"", arguments=())
    pair.a.receive_datagram(forged, STRANGER, 0.0)
    assert len(pair.a.table) == 1
    pair.b.leave(0.0)
    pair.exchange()
    assert len(pair.a.table) == 0


def test_stores_need_a_token_and_get_one() -> None:
    holder = machine(1)
    item = record(machine(3))
    holder.receive_datagram(request(wire.STORE, [item.key + item.body], challenge=bytes(16)), STRANGER, 0.0)
    reply = reply_of(holder)
    assert list(reply.results[0]) == [StoreOutcome.BAD_TOKEN]
    holder.receive_datagram(request(wire.STORE, [item.key + item.body], token=reply.token), STRANGER, 0.0)
    assert list(reply_of(holder).results[0]) == [StoreOutcome.STORED]
    # another address cannot use it
    holder.receive_datagram(request(wire.STORE, [item.key + item.body], token=reply.token), A, 0.0)
    (answer,) = [wire.decode(data) for data, _ in holder.datagrams_to_send() if wire.decode(data).kind & wire.REPLY]
    assert answer.flags & wire.FLAG_AGAIN and len(answer.body) == 4


def test_tokens_outlive_one_change_of_the_secret_and_not_two() -> None:
    holder = machine(1)
    holder.receive_datagram(request(wire.PING), STRANGER, 0.0)
    token = reply_of(holder).token
    for now, good in ((1.0, True), (301.0, True), (650.0, False)):
        while holder.timer_at() <= now:
            holder.handle_timer(now)
        item = record(machine(3), sequence=1 + int(now))
        holder.receive_datagram(request(wire.STORE, [item.key + item.body], token=token), STRANGER, now)
        reply = reply_of(holder)
        assert [list(result) for result in reply.results] == ([[StoreOutcome.STORED]] if good else [])
        assert bool(reply.flags & wire.FLAG_AGAIN) is not good


def test_a_holder_that_restarted_gives_a_new_token_and_the_call_goes_on() -> None:
    pair = Pair()
    pair.join()
    pair.b = machine(2)
    pair.b.tokens = Tokens(random.Random(99), now=0.0)
    number = pair.a.write([record(pair.a)], 0.0)
    pair.exchange()
    assert WriteFinished(number, [2], [0]) in pair.a.events()
    assert dropped(pair.b, "token") == 1


@pytest.mark.parametrize("length", [200, 400, 1100])
def test_a_reply_to_an_unproven_address_is_no_amplifier(length: int) -> None:
    holder = machine(1)
    for index in range(8):
        holder.storage.add(record(machine(3), sequence=index + 1, size=100, subkey=str(index)), WALL)
    short = wire.encode(
        wire.GET, wire.FLAG_CLIENT, bytes(8), bytes([7] * 32), (b"", bytes(16), KEY, bytes(length - 60))
    )
    holder.receive_datagram(short, STRANGER, 0.0)
    sent = sum(len(data) for data, _ in holder.datagrams_to_send())
    assert (0 < sent <= 3 * len(short)) if len(short) >= 400 else sent == 0


def test_wrong_signatures_forged_replies_and_replies_nobody_asked_for_are_counted() -> None:
    pair = Pair()
    pair.join()
    item = bytearray(record(pair.b).body)
    item[10] ^= 1
    token = next(iter(pair.a.table.contacts())).token
    stored = wire.encode_request(
        wire.STORE, 0, bytes(8), pair.a.own_id, token=token, challenge=b"", arguments=([KEY + bytes(item)],)
    )
    pair.b.receive_datagram(stored, A, 0.0)
    assert dropped(pair.b, "invalid_record") == 1 and pair.b.storage.num_entries == 0
    pair.b.datagrams_to_send()
    pair.a.read(bytes(range(32)), 0.0)
    ((question, _),) = pair.a.datagrams_to_send()
    pair.b.receive_datagram(question, A, 0.0)
    ((answer, _),) = pair.b.datagrams_to_send()
    pair.a.receive_datagram(answer, STRANGER, 0.0)
    assert dropped(pair.a, "spoofed") == 1 and pair.a.events() == []
    pair.a.receive_datagram(answer, B, 0.0)
    assert isinstance(pair.a.events()[0], ReadFinished)
    pair.a.receive_datagram(answer, B, 0.0)
    assert dropped(pair.a, "unasked") == 1


def test_a_node_that_answers_in_another_s_name_never_enters_the_table() -> None:
    a, liar = machine(1), machine(2)
    liar.own_id = bytes([9] * 32)  # it has no key for this id
    a.membership.set_seeds([(B, None)], 0.0)
    a.handle_timer(0.0)
    for data, _ in a.datagrams_to_send():
        liar.receive_datagram(data, A, 0.0)
    for data, address in liar.datagrams_to_send():
        if address == A:
            a.receive_datagram(data, B, 0.0)
    assert dropped(a, "proof") == 1
    assert len(a.table) == 0


def test_a_flood_from_one_source_is_cut_off_and_others_are_served() -> None:
    holder = machine(1)
    burst = int(2 * MAX_REQUEST_RATE)
    for _ in range(burst + 80):
        holder.receive_datagram(request(wire.PING, flags=wire.FLAG_CLIENT), STRANGER, 0.0)
    assert len(holder.datagrams_to_send()) == burst and dropped(holder, "rate") == 80
    holder.receive_datagram(request(wire.PING, flags=wire.FLAG_CLIENT), A, 0.0)
    assert len(holder.datagrams_to_send()) == 1


@pytest.mark.parametrize("count", [5_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_any_number_of_ids_of_one_range_take_no_place_and_no_memory(count: int) -> None:
    holder = machine(1)
    rng = random.Random(0)
    pings = 0
    for index in range(count):
        data = wire.encode(wire.PING, 0, bytes(8), rng.randbytes(32), (b"", b"", bytes(350)))
        holder.receive_datagram(data, ("8.8.8." + str(index % 250), 1024 + index % 60000), index / MAX_REQUEST_RATE)
        pings += sum(1 for sent, _ in holder.datagrams_to_send() if wire.decode(sent).kind == wire.PING)
    # unproven ids cost a bounded number of pings and stay out of the table
    assert pings <= 64
    assert len(holder.table) == 0
    assert len(holder.known) <= 2048 and len(holder.pings.in_progress) <= 64


def test_a_policy_decides_whose_records_are_held() -> None:
    friend, other = machine(3), machine(4)
    holder = machine(1, policy=Policy(hosts=[friend.identity.peer_id]))
    holder.receive_datagram(request(wire.PING), STRANGER, 0.0)
    token = reply_of(holder).token
    for owner, outcome in ((friend, StoreOutcome.STORED), (other, StoreOutcome.REFUSED)):
        item = record(owner)
        holder.receive_datagram(request(wire.STORE, [item.key + item.body], token=token), STRANGER, 0.0)
        assert list(reply_of(holder).results[0]) == [outcome]


def test_a_client_is_served_and_never_listed_and_holds_nothing() -> None:
    pair = Pair()
    pair.a = machine(1, public=False)
    pair.a.membership.end_dial_wait()
    pair.join()
    assert len(pair.a.table) == 1 and len(pair.b.table) == 0
    number = pair.a.write([record(pair.a)], 0.0)
    pair.exchange()
    assert WriteFinished(number, [1], [0]) in pair.a.events()
    assert pair.a.storage.num_entries == 0
    # also not where somebody insists
    item = record(pair.b)
    stores = request(wire.STORE, [item.key + item.body], token=pair.a.tokens.give(pack_address(STRANGER)))
    pair.a.receive_datagram(stores, STRANGER, 0.0)
    assert wire.read_outcomes(reply_of(pair.a).results, 1) == [StoreOutcome.REFUSED]
    assert pair.a.storage.num_entries == 0


def test_a_client_that_others_were_told_of_is_not_listed_either() -> None:
    pair = Pair()
    pair.b = machine(2, public=False)
    pair.b.membership.end_dial_wait()
    pair.join()  # by the address given as a seed: it answers, and says what it is
    assert pair.a.metrics.snapshot()["network_datagrams_received"] >= 1
    assert len(pair.a.table) == 0


def test_what_has_expired_is_dropped_without_being_asked_for() -> None:
    holder = machine(1)
    holder.storage.put(record(machine(3), ttl=20.0))
    while (at := holder.timer_at()) < 49.0:
        holder.handle_timer(at)
    assert holder.storage.num_entries == 1, "clocks differ"
    while (at := holder.timer_at()) < 80.0:
        holder.handle_timer(at)
    assert holder.storage.num_entries == 0


def test_contacts_of_a_kind_of_ip_that_a_node_does_not_speak_are_left_out() -> None:
    subject, teller = machine(1), Contact(bytes([3] * 32), B)
    told = [Contact(bytes([4] * 32), ("2606:4700::7", 4000)), Contact(bytes([5] * 32), ("8.8.8.7", 4000))]
    v4, v6 = pack_contacts(told, 1000)
    subject.scope = AddressScope()
    for lengths, expected in (((V4_BYTES, V6_BYTES), told), ((V4_BYTES,), told[1:]), ((V6_BYTES,), told[:1])):
        subject.address_bytes = lengths
        found = subject.contacts_from(teller, v4, v6, 0.0)
        assert {contact.raw for contact in found} == {contact.raw for contact in expected}


def test_a_clock_that_is_wrong_is_reported_at_once_and_only_once() -> None:
    pair = Pair()
    pair.b = machine(2, skew=300.0)
    pair.join()
    for _ in range(3):
        pair.a.read(bytes(range(32)), 0.0)
        pair.exchange()
    (event,) = [event for event in pair.a.events() if isinstance(event, ClockSkewed)]
    assert 290 < event.seconds < 310
    while pair.now < 20.0:
        pair.now = pair.a.timer_at()
        pair.a.handle_timer(pair.now)
        pair.exchange()
    assert not [event for event in pair.a.events() if isinstance(event, ClockSkewed)]


class Trio:
    """A node of unknown role, its first contact, and a third node."""

    def __init__(self) -> None:
        self.machines: dict[Address, NetworkProtocol] = {
            A: machine(1, public=False),
            B: machine(2),
            STRANGER: machine(3),
        }
        self.now = 0.0
        self.machines[STRANGER].membership.set_seeds([(B, None)], 0.0)
        self.run(1.0)
        self.machines[A].membership.set_seeds([(B, None)], 0.0)

    def run(self, seconds: float, *, filtered: bool = False) -> None:
        end = self.now + seconds
        written: set[Address] = set()
        while self.now < end:
            for protocol in self.machines.values():
                protocol.handle_timer(self.now)
            queue = [
                (data, origin, where)
                for origin, item in self.machines.items()
                for data, where in item.datagrams_to_send()
            ]
            while queue:
                data, origin, where = queue.pop(0)
                if origin == A:
                    written.add(where)
                if filtered and where == A and origin not in written:
                    continue
                self.machines[where].receive_datagram(data, origin, self.now)
                queue += [(sent, where, to) for sent, to in self.machines[where].datagrams_to_send()]
            self.now += 0.1


def test_a_node_that_a_third_one_can_dial_becomes_public() -> None:
    trio = Trio()
    assert trio.machines[A].role == "unknown"
    trio.run(10.0)
    assert NodeRoleChanged("public") in trio.machines[A].events()
    assert trio.machines[A].own_id in trio.machines[B].table


def test_a_node_behind_a_gateway_becomes_a_client_and_is_listed_by_nobody() -> None:
    trio = Trio()
    trio.run(60.0, filtered=True)
    assert NodeRoleChanged("client") in trio.machines[A].events()
    assert all(trio.machines[A].own_id not in trio.machines[other].table for other in (B, STRANGER))


def test_a_client_is_asked_for_its_token_before_it_dials_and_a_flood_of_that_is_bounded() -> None:
    b = machine(2)
    b.dial_back.note_client(STRANGER)
    token = b.tokens.give(pack_address(A))
    for number in range(MAX_ERRANDS + 50):
        b.receive_datagram(request(wire.DIAL, number.to_bytes(8, "big"), token=token), A, 0.0)
    pings = [data for data, to in b.datagrams_to_send() if to == STRANGER]
    assert len(pings) == MAX_ERRANDS
    ping = wire.decode(pings[0])
    helper = machine(3, public=False)
    helper.receive_datagram(pings[0], B, 0.0)
    assert ping.kind == wire.PING
    for data, to in helper.datagrams_to_send():
        assert to == B
        b.receive_datagram(data, STRANGER, 0.0)
    sent = [wire.decode(data) for data, to in b.datagrams_to_send() if to == STRANGER]
    (order,) = [item for item in sent if item.kind == wire.DIAL_FOR]
    assert b.dial_back.thirds.num_errands == MAX_ERRANDS - 1
    assert helper.tokens.holds(wire.read_request(order).token, pack_address(B))


def test_a_third_node_it_wrote_to_before_proves_nothing() -> None:
    trio = Trio()
    node = trio.machines[A]
    node.outbox.note_sent(STRANGER, 0.0)
    trio.run(10.0)
    assert node.role != "public"


@pytest.mark.parametrize("role", ["client", "public"])
def test_a_node_that_dialed_for_others_is_not_proven_by_those_it_dialed(role: str) -> None:
    """A client that dials opens its own gateway. For who is public that means nothing, and others could make it so."""
    node = machine(1, public=False)
    node.outbox.role = role
    listed = Contact(bytes([7] * 32), B)
    listed.proven = True
    node.table.add(listed, 0.0)
    order = request(wire.DIAL_FOR, pack_address(STRANGER), bytes(8), token=node.tokens.give(pack_address(B)))
    node.receive_datagram(order, B, 0.0)
    assert STRANGER in [to for _, to in node.datagrams_to_send()]
    node.dial_back.ask(0.0)
    (asked,) = [wire.decode(data) for data, _ in node.datagrams_to_send()]
    (nonce,) = wire.read_request(asked).arguments[:1]
    node.receive_datagram(wire.encode(wire.DIALED, 0, bytes(8), bytes(32), (b"", b"", nonce)), STRANGER, 1.0)
    while (now := node.timer_at()) < 3.0:
        node.handle_timer(now)
    sent = [wire.decode(data) for data, _ in node.datagrams_to_send()]
    asks = [wire.read_request(one).arguments[0] for one in sent if one.kind == wire.DIAL]
    assert any(one != nonce for one in asks) == (role == "client"), "one that is proven asks no more"


def test_newly_closer_nodes_get_copies_and_only_of_what_they_lack() -> None:
    pair = Pair()
    for index in range(3):
        pair.a.storage.add(record(pair.a, subkey=str(index)), WALL)
    pair.b.storage.add(record(pair.a, subkey="0"), WALL)
    pair.join()
    for _ in range(5):
        pair.now += 0.1
        pair.a.handle_timer(pair.now)
        pair.exchange()
    assert pair.b.storage.num_entries == 3
    assert pair.a.metrics.total("network_records_copied") == 2


def test_a_reader_repairs_a_holder_that_lags() -> None:
    pair = Pair()
    pair.join()
    pair.a.storage.add(record(pair.b, sequence=1), WALL)
    pair.b.storage.add(record(pair.b, sequence=2), WALL)
    pair.b.read(KEY, 0.0)
    pair.exchange()
    (event,) = [event for event in pair.b.events() if isinstance(event, ReadFinished)]
    assert [item.sequence for item in event.records] == [2]
    assert [item.sequence for item in pair.a.storage.records(KEY)] == [2]


def test_a_client_whose_gateway_gives_it_another_port_is_served_as_before() -> None:
    pair = Pair()
    pair.a = machine(1, public=False)
    pair.a.membership.end_dial_wait()
    pair.join()
    for index in range(4):
        pair.b.storage.add(record(pair.b, subkey=str(index), size=100), WALL)
    number = pair.a.read(KEY, 0.0)
    moved = (A[0], A[1] + 1)
    events = []
    while not events:
        sent = pair.a.datagrams_to_send()
        assert sent, "it never comes to a standstill"
        for data, _ in sent:
            pair.b.receive_datagram(data, moved, 0.0)
        for data, address in pair.b.datagrams_to_send():
            assert address == moved
            pair.a.receive_datagram(data, B, 0.0)
        events = [event for event in pair.a.events() if isinstance(event, ReadFinished)]
    assert events[0].operation == number and len(events[0].records) == 4


def test_a_holder_that_sends_forged_pages_is_passed_over() -> None:
    pair = Pair()
    pair.join()
    for index in range(20):
        pair.b.storage.add(record(pair.b, subkey=str(index), size=100), WALL)
    genuine = pair.b.storage.page

    def forged(key: bytes, start: int, end: int, room: int) -> tuple[list[bytes], int | None]:
        bodies, cursor = genuine(key, start, end, room)
        return [bytes([body[0] ^ 1]) + body[1:] for body in bodies], cursor

    pair.b.storage.page = forged  # type: ignore[method-assign]
    pair.a.read(KEY, 0.0)
    events = []
    while not events:
        pair.exchange()
        pair.now += 1e-3
        pair.a.handle_timer(pair.now)
        events = [event for event in pair.a.events() if isinstance(event, ReadFinished)]
        assert pair.now < 5.0
    assert events[0].records == []
    assert dropped(pair.a, "invalid_record") > 0


def test_a_slice_of_copying_survives_the_loss_of_everybody() -> None:
    pair = Pair()
    pair.a.storage.add(record(pair.a), WALL)
    pair.join()
    pair.a.table.remove(pair.a.table.contacts()[0])
    while pair.now < 2500.0:
        pair.now = pair.a.timer_at()
        pair.a.handle_timer(pair.now)
        pair.a.datagrams_to_send()


def test_after_the_own_loop_stood_still_nobody_is_judged_before_the_socket_is_read() -> None:
    pair = Pair()
    pair.join()
    pair.a.read(bytes(range(32)), 0.0)
    for data, _ in pair.a.datagrams_to_send():
        pair.b.receive_datagram(data, A, 0.0)
    answers = pair.b.datagrams_to_send()
    # the replies lie in the socket while this loop stands still, again and again
    for now in (20.0, 40.0, 60.0):
        pair.a.handle_timer(now)
        assert len(pair.a.table) == 1
    for data, _ in answers:
        pair.a.receive_datagram(data, B, 60.0)
    assert any(isinstance(event, ReadFinished) for event in pair.a.events())
    assert len(pair.a.table) == 1


def test_a_dead_holder_is_not_waited_for_until_its_request_is_repeated() -> None:
    nodes = {(f"10.0.1.{index}", 4000): machine(10 + index) for index in range(6)}
    addresses = list(nodes)
    now = 0.0

    def exchange(deaf: Address | None) -> None:
        while moved := [(data, at, to) for at, node in nodes.items() for data, to in node.datagrams_to_send()]:
            for data, at, to in moved:
                if deaf not in (at, to):
                    nodes[to].receive_datagram(data, at, now)

    for address in addresses[1:]:
        nodes[address].membership.set_seeds([(addresses[0], None)], now)
        nodes[address].handle_timer(now)
        exchange(None)
    writer, dead = nodes[addresses[1]], addresses[5]
    writer.events()
    writer.write([record(writer)], now)
    exchange(dead)
    while not any(isinstance(event, WriteFinished) and event.num_holders == [5] for event in writer.events()):
        now = writer.timer_at()
        writer.handle_timer(now)
        exchange(dead)
    assert now == pytest.approx(SHORTEST_WAIT)


def test_a_write_whose_own_loop_stood_still_reads_the_socket_before_it_ends() -> None:
    nodes = {(f"10.0.1.{index}", 4000): machine(10 + index) for index in range(6)}
    addresses = list(nodes)
    held: list[tuple[bytes, Address, Address]] = []

    def exchange(now: float, slow: Address | None) -> None:
        while moved := [(data, at, to) for at, node in nodes.items() for data, to in node.datagrams_to_send()]:
            for data, at, to in moved:
                if at == slow:
                    held.append((data, at, to))
                else:
                    nodes[to].receive_datagram(data, at, now)

    for address in addresses[1:]:
        nodes[address].membership.set_seeds([(addresses[0], None)], 0.0)
        nodes[address].handle_timer(0.0)
        exchange(0.0, None)
    writer = nodes[addresses[1]]
    writer.events()
    writer.write([record(writer)], 0.0)
    exchange(0.0, addresses[5])
    writer.handle_timer(0.3)
    assert not any(isinstance(event, WriteFinished) for event in writer.events())
    for data, at, to in held:
        nodes[to].receive_datagram(data, at, 0.3)
    assert [event.num_holders for event in writer.events() if isinstance(event, WriteFinished)] == [[6]]


@pytest.mark.parametrize("host, least, most", [("8.8.8.{}", 9, 9), ("8.8.{0}.{0}", 3, 8)])
def test_holders_of_one_address_range_count_as_one(host: str, least: int, most: int) -> None:
    """Nine holders with equal digests: of nine networks, a few answers do; of one network, all are asked."""
    reader = machine(1)
    holders = {(host.format(index), 4000): machine(10 + index) for index in range(1, 10)}
    named = [Contact(holder.own_id, address) for address, holder in holders.items()]
    everybody: dict[Address, NetworkProtocol] = dict(holders)
    for holder in holders.values():
        holder.storage.add(record(reader), WALL)
    for index in range(3):  # no path of a lookup hears of more than three of one range

        class Teller(LyingProtocol):
            accomplices = named[3 * index : 3 * index + 3]

        teller = machine(30 + index, kind=Teller)
        known = Contact(teller.own_id, (f"9.9.{index}.9", 4000))
        known.proven = True
        reader.table.add(known, 0.0)
        everybody[known.address] = teller
    reader.scope = AddressScope()
    reader.read(KEY, 0.0)
    asked: set[Address] = set()
    events: list[Any] = []
    while not events:
        sent = [(data, to) for data, to in reader.datagrams_to_send() if wire.decode(data).kind == wire.GET]
        assert sent
        asked |= {to for _, to in sent if to in holders}
        for data, to in sent:
            everybody[to].receive_datagram(data, A, 0.0)
            for answer, back in everybody[to].datagrams_to_send():
                if back == A and wire.decode(answer).kind & wire.REPLY:
                    reader.receive_datagram(answer, to, 0.0)
        events = [event for event in reader.events() if isinstance(event, ReadFinished)]
    assert least <= len(asked) <= most


def test_a_seed_that_names_nobody_new_costs_one_rpc() -> None:
    node = machine(1)
    others = [machine(10 + index) for index in range(8)]
    addresses = {(f"10.0.1.{index}", 4000): other for index, other in enumerate(others)}
    seed_address, seed = next(iter(addresses.items()))
    for address, other in list(addresses.items())[1:]:
        listed = Contact(other.own_id, address)
        listed.proven = True
        seed.table.add(listed, 0.0)

    def exchange() -> list[int]:
        kinds = []
        while sent := node.datagrams_to_send():
            for data, to in sent:
                kinds.append(wire.decode(data).kind)
                addresses[to].receive_datagram(data, A, 0.0)
                for answer, back in addresses[to].datagrams_to_send():
                    if back == A and wire.decode(answer).kind & wire.REPLY:
                        node.receive_datagram(answer, to, 0.0)
        return kinds

    node.membership.set_seeds([(seed_address, None)], 0.0)
    node.handle_timer(0.0)
    exchange()
    assert len(node.table) == 8
    newcomer = machine(99)
    addresses[("10.0.1.99", 4000)] = newcomer
    listed = Contact(newcomer.own_id, ("10.0.1.99", 4000))
    listed.proven = True
    seed.table.add(listed, 0.0)
    node.membership.ask_seeds(0.0)
    # it is new and near (so small a network is all neighborhood): whom it knows is looked up
    assert exchange().count(wire.FIND) > 2
    assert newcomer.own_id in node.table
    node.membership.ask_seeds(0.0)
    assert exchange() == [wire.FIND], "nobody new"


def test_calls_under_way_are_bounded_and_the_others_wait_their_turn() -> None:
    pair = Pair()
    pair.join()
    (other,) = pair.a.table.contacts()
    for index in range(MAX_CALLS + 100):
        pair.a.call(Caller(), wire.FIND, (index.to_bytes(32, "big"),), other, 0.0)
    sent = pair.a.datagrams_to_send()
    assert len(sent) == MAX_CALLS
    targets = set()
    while sent:
        assert len(sent) <= MAX_CALLS
        for data, _ in sent:
            targets.add(wire.read_request(wire.decode(data)).arguments[0])
            pair.b.receive_datagram(data, A, 0.0)
        for data, _ in pair.b.datagrams_to_send():
            pair.a.receive_datagram(data, B, 0.0)
        sent = pair.a.datagrams_to_send()
    assert len(targets) == MAX_CALLS + 100


def test_a_bucket_that_no_lookup_went_through_is_refreshed_and_one_that_was_used_is_not() -> None:
    pair = Pair()
    pair.join()
    looked_up: list[float] = []

    def run(until: float, *, used: bool) -> None:
        while pair.now < until:
            pair.now = min(pair.a.timer_at(), until)
            pair.a.handle_timer(pair.now)
            if used:
                pair.a.read(pair.a.own_id[:31] + b"x", pair.now)
            for data, _ in pair.exchange():
                sent = wire.decode(data)
                # seeds are asked for this node's own id meanwhile
                if sent.kind == wire.FIND and wire.read_request(sent).arguments[0] != pair.a.own_id:
                    looked_up.append(pair.now)

    run(0.9 * REFRESH_PERIOD, used=False)
    assert looked_up == []
    run(2.0 * REFRESH_PERIOD, used=True)
    assert looked_up == [], "the only bucket is used by the reads"
    run(3.2 * REFRESH_PERIOD, used=False)
    assert looked_up and min(looked_up) >= 2.8 * REFRESH_PERIOD


def test_pages_are_asked_for_several_at_a_time_and_no_more_than_that() -> None:
    pair = Pair()
    pair.a.outbox.forced_client = True
    pair.join()
    for index in range(500):
        pair.b.storage.put(record(pair.b, subkey=str(index), size=100))
    pair.a.read(KEY, 0.0)
    waiting: list[bytes] = []
    most, events = 0, []
    while not events:
        waiting += [data for data, to in pair.a.datagrams_to_send() if to == B]
        most = max(most, sum(wire.decode(data).kind == wire.PAGE for data in waiting))
        if waiting:
            pair.b.receive_datagram(waiting.pop(0), A, pair.now)
            for data, to in pair.b.datagrams_to_send():
                if to == A:
                    pair.a.receive_datagram(data, B, pair.now)
        else:
            pair.now += 1e-3
        pair.a.handle_timer(pair.now)
        events = [event for event in pair.a.events() if isinstance(event, ReadFinished)]
    assert len(events[0].records) == 500 and events[0].complete
    assert most == PAGES_IN_PROGRESS


def table_of(node: NetworkProtocol, *addresses: Address) -> list[Contact]:
    """Lists proven contacts at these addresses."""
    contacts = [Contact(bytes([0x70 + index] * 32), address) for index, address in enumerate(addresses)]
    for contact in contacts:
        contact.proven = True
        node.table.add(contact, 0.0)
    return contacts


PRIVATE_TARGETS = [("10.0.0.1", 80), ("127.0.0.1", 22), ("169.254.169.254", 80), ("192.168.1.255", 9), ("fd00::1", 9)]
PRIVATE_TARGETS += [("::1", 22), ("fe80::1", 9), ("64:ff9b::a00:1", 80), ("2002:7f00:1::1", 80), ("100.64.0.1", 80)]


@pytest.mark.parametrize("target", PRIVATE_TARGETS)
def test_nobody_makes_a_public_node_send_to_private_addresses(target: Address) -> None:
    """Not by asking it to dial, not by naming a contact there, and not by writing from there."""
    node = machine(1)
    node.scope = AddressScope(["8.8.4.4"])
    node.address_bytes = (V4_BYTES, V6_BYTES)
    friend = ("9.9.9.9", 4000)
    (liar,) = table_of(node, friend)
    token = node.tokens.give(pack_address(friend))
    dial_for = (pack_address(target), bytes(8))
    node.receive_datagram(
        wire.encode_request(wire.DIAL_FOR, 0, bytes(8), liar.peer_id, token=token, challenge=b"", arguments=dial_for),
        friend,
        0.0,
    )
    node.read(KEY, 0.0)
    asked = [wire.decode(data) for data, _ in node.datagrams_to_send()]
    named = pack_contacts([Contact(bytes([9] * 31 + [index]), target) for index in range(20)], 1000)
    for request_ in asked:
        body = (pack_address(("8.8.4.4", 1)), bytes(8), b"", WALL, 0, b"", [], *named)
        node.receive_datagram(
            wire.encode(request_.kind | wire.REPLY, 0, request_.transaction, liar.peer_id, body), friend, 0.01
        )
    node.handle_timer(1.0)
    assert target not in [to for _, to in node.datagrams_to_send()]
    if target[0] not in ("127.0.0.1", "::1"):  # from loopback only this machine can write
        node.receive_datagram(request(wire.PING), target, 1.0)
        sent = [wire.decode(data).kind for data, to in node.datagrams_to_send() if to == target]
        assert all(kind & wire.REPLY for kind in sent), "answered at most, and not pinged"


def test_dialing_for_others_is_for_listed_contacts_and_has_bounds() -> None:
    node = machine(1)
    node.scope = AddressScope(["8.8.4.4"])
    friend, victim = ("9.9.9.9", 4000), ("8.8.8.8", 53)
    (liar,) = table_of(node, friend)

    def ask(sender: bytes, source: Address, target: Address, now: float) -> int:
        order = wire.encode_request(
            wire.DIAL_FOR,
            0,
            bytes(8),
            sender,
            token=node.tokens.give(pack_address(source)),
            challenge=b"",
            arguments=(pack_address(target), bytes(8)),
        )
        node.receive_datagram(order, source, now)
        return sum(to == target for _, to in node.datagrams_to_send())

    assert ask(bytes([7] * 32), ("7.7.7.7", 1), victim, 0.0) == 0, "a stranger"
    assert ask(liar.peer_id, ("7.7.7.7", 1), victim, 0.0) == 0, "another in a contact's name"
    for host in ("10.0.0.1", "169.254.169.254", "127.0.0.1", "192.168.1.255"):
        assert ask(liar.peer_id, friend, (host, 80), 0.0) == 0, "not for a stranger's sake"
    assert ask(liar.peer_id, friend, victim, 0.0) == 1
    to_one = sum(ask(liar.peer_id, friend, (victim[0], port), 0.0) for port in range(1, 1000))
    assert 0 < to_one <= 16, "whatever the port"
    to_many = sum(ask(liar.peer_id, friend, (f"8.8.{index}.1", 53), 0.0) for index in range(200))
    assert to_many <= 64


def test_one_place_that_many_contacts_are_said_to_live_at_is_asked_a_few_times() -> None:
    node = machine(1)
    victims = [Contact(index.to_bytes(32, "big"), ("8.8.8.8", index)) for index in range(1, 500)]
    failed: list[object] = []

    class Asker(Caller):
        def call_failed(self, call: Call, now: float) -> None:
            failed.append(call)

    for victim in victims:
        node.call(Asker(), wire.FIND, (KEY,), victim, 0.0)
    assert not failed, "never before the call returns"
    node.handle_timer(0.0)
    assert len(node.datagrams_to_send()) == 12 and len(failed) == len(victims) - 12


def test_a_node_holds_what_belongs_near_it_and_nothing_else() -> None:
    rng = random.Random(5)
    network = SimulatedNetwork(seed=6, public_addresses=True)
    nodes = network.add_settled_swarm(1000)
    node, writer = nodes[0].protocol, nodes[1]
    address = ("9.9.9.9", 4000)

    def store(key: bytes) -> StoreOutcome:
        one = SignedRecord.sign(
            writer.protocol.identity,
            key,
            sequence=1,
            expiration=node.wall(network.clock.now) + 60.0,
            value=b"\1",
        )
        return node.holder.store(key, one.body, bytes(32), address, network.clock.now)

    own = node.table.own_number
    # as near as one of the k holders is in a network of 1,000
    near = [(own ^ rng.randrange(2**256 // 50)).to_bytes(32, "big") for _ in range(100)]
    assert [store(key) for key in near] == [StoreOutcome.STORED] * 100
    far = [rng.randbytes(32) for _ in range(300)]
    assert sum(store(key) is StoreOutcome.STORED for key in far) <= 30


def test_a_datagram_from_port_0_is_dropped() -> None:
    holder = machine(1)
    for kind in (wire.PING, wire.DIALED):
        holder.receive_datagram(request(kind), ("8.8.8.8", 0), 0.0)
    assert dropped(holder, "malformed") == 2 and not holder.datagrams_to_send()
