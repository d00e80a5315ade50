"""A node that says it is public and is not: found out by a third one's dial, and not listed."""

import random

from tesseract_async.identity import Identity
from tesseract_async.metrics import Metrics
from tesseract_async.network import datagrams as wire
from tesseract_async.network.contacts import Address, Contact, pack_address
from tesseract_async.network.dial_back import MAX_PENDING, MAX_REMEMBERED
from tesseract_async.network.protocol import NetworkProtocol
from tesseract_async.network.settings import NetworkSettings

A, B, C, X = (("20.0.0.1", 1), ("21.0.0.1", 1), ("22.0.0.1", 1), ("23.0.0.1", 1))


def machine(seed: int) -> NetworkProtocol:
    return NetworkProtocol(
        identity=Identity.from_seed(bytes([seed] * 32)),
        settings=NetworkSettings(),
        random=random.Random(seed),
        metrics=Metrics(),
        now=0.0,
        wall_offset=1_700_000_000.0,
        is_declared_public=True,  # all of them say so
    )


class Town:
    """A, B and C know one another; X comes and writes to A alone. Its gateway lets in whom X has written to."""

    def __init__(self, *, gateway: bool) -> None:
        self.machines = {address: machine(number) for number, address in enumerate((A, B, C, X), start=1)}
        self.now = 0.0
        self.gateway = gateway
        self.num_lost = 0
        for address in (B, C):
            self.machines[address].membership.set_seeds([(A, None)], 0.0)
        self.run(20.0)
        assert all(len(self.machines[address].table) == 2 for address in (A, B, C))
        x = self.machines[X]
        x.outbox.note_sent(A, self.now)
        data = wire.encode_request(
            wire.PING,
            x.outbox.flags(),
            bytes(8),
            x.own_id,
            token=b"",
            challenge=bytes(wire.CHALLENGE_BYTES),
            arguments=(),
        )
        self.machines[A].receive_datagram(data, X, self.now)

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now += 0.1
            for one in self.machines.values():
                one.handle_timer(self.now)
            while any([self.carry(address) for address in self.machines]):
                pass

    def carry(self, source: Address) -> bool:
        sent = self.machines[source].datagrams_to_send()
        for data, target in sent:
            if source == X and target != A:
                continue  # it writes to A alone
            if self.gateway and target == X and source != A:
                continue
            if wire.decode(data).kind == wire.DIALED and self.num_lost > 0:
                self.num_lost -= 1
                continue
            if target in self.machines:
                self.machines[target].receive_datagram(data, source, self.now)
        return bool(sent)

    @property
    def listed(self) -> bool:
        return self.machines[X].own_id in self.machines[A].table


def test_a_newcomer_that_a_third_node_can_dial_is_listed() -> None:
    town = Town(gateway=False)
    town.run(1.0)
    assert town.listed
    assert not town.machines[A].probation.pending and not town.machines[A].probation.nonces


def test_a_newcomer_that_lies_about_it_is_not_listed() -> None:
    """A's own pings come back, through the hole that X has made by writing to A. That proves nothing."""
    town = Town(gateway=True)
    town.run(60.0)
    assert not town.listed
    assert town.machines[A].metrics.total("network_contacts_dropped") == 1
    assert not town.machines[A].probation.pending and not town.machines[A].probation.nonces


def test_lost_datagrams_are_no_proof_of_a_lie() -> None:
    town = Town(gateway=False)
    town.num_lost = 2
    town.run(10.0)
    assert town.listed


def test_only_the_dialed_node_can_confirm_it() -> None:
    town = Town(gateway=True)
    town.run(0.1)
    a = town.machines[A]
    (nonce,) = a.probation.nonces
    for origin in (B, ("23.0.0.1", 2)):
        assert not a.probation.confirmed(nonce, origin, town.now)
    assert not a.probation.confirmed(bytes(8), X, town.now)
    assert not town.listed


def test_a_newcomer_that_fell_silent_before_it_was_dialed_is_not_listed_by_that() -> None:
    town = Town(gateway=True)
    town.run(0.1)
    a = town.machines[A]
    (nonce,) = a.probation.nonces
    contact, _ = a.probation.pending[a.probation.nonces[nonce]]
    a.lost(contact, town.now)
    a.receive_datagram(wire.encode(wire.DIALED, 0, bytes(8), contact.peer_id, (b"", b"", nonce)), X, town.now)
    assert not town.listed
    assert not a.probation.holds(contact, town.now), "it is listed as soon as it proves its id again"


def test_nobody_is_made_to_write_to_third_parties() -> None:
    town = Town(gateway=False)
    x = town.machines[X]
    x.datagrams_to_send()
    dialed = wire.encode(wire.DIALED, 0, bytes(8), x.own_id, (b"", b"", bytes(8), pack_address(("9.9.9.9", 9))))
    x.receive_datagram(dialed, C, town.now)
    assert ("9.9.9.9", 9) not in [target for _, target in x.datagrams_to_send()]


def test_memory_is_bounded() -> None:
    town = Town(gateway=True)
    town.run(1.0)
    a = town.machines[A]
    for number in range(MAX_REMEMBERED + 10):
        address = (f"24.{number >> 16}.{number >> 8 & 255}.{number & 255}", 1)
        a.probation.wrote(address, town.now)
        contact = Contact(number.to_bytes(32, "big"), address)
        assert a.probation.holds(contact, town.now)
        assert a.probation.holds(contact, town.now), "asked once"
    a.datagrams_to_send()
    assert len(a.probation.wrote_first) == MAX_REMEMBERED and len(a.probation.pending) == MAX_PENDING
    for _ in range(4):
        town.now += 3.0
        a.handle_timer(town.now)
    assert not a.probation.pending and not a.probation.nonces
