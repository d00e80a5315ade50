"""What strangers publish, offer and answer besides calls: decoders raise their documented error or nothing."""

import copy
import random
from collections.abc import Callable

import msgpack
import pytest
import torch

from tesseract_async.errors import CheckpointError, ProtocolError
from tesseract_async.experts import claiming, grants, manifest, run
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.trust import belongs_under_its_key
from tesseract_async.identity import SignedRecord
from tesseract_async.monitoring import status
from tesseract_async.nat import offers, preamble
from tesseract_async.nat.webrtc.message_stream import MessageStream
from tesseract_async.server import checkpoint
from tesseract_async.wire import stun
from tesseract_async.wire.codecs import CodecPolicy
from tests.experts.test_run import ALICE, BOB, DIGITS
from tests.fuzz.test_wire import mutate, value
from tests.monitoring.test_status import STATUS
from tests.nat.test_offers import DESCRIPTION

TAG = manifest.RunTag(ALICE.peer_id, "digits", "granted")
GRANT = grants.sign_grant(ALICE, TAG.run_id("ffn"), BOB.peer_id, ["host"], serial=1, not_after=2)
PARTS = [
    part
    for tag, grant in ((None, b""), (TAG, GRANT.blob))
    for part, _ in manifest.encode_manifest(
        *(["10.0.0.1:1", "[::1]:2"], {(1, 2): True, (3, 4): False}), prefix="ffn", sequence=1, tag=tag, grant=grant
    )
]
(REVOCATIONS,) = grants.sign_revocations(ALICE, bytes(16), number=0, since=1, peers=[BOB.peer_id])
APPOINTMENT = grants.sign_appointment(ALICE, bytes(16), ExpertPattern.parse("ffn.[0:4]"), serial=1, peer=BOB.peer_id)
RESERVATION = claiming.encode_reservation([(1, 2), (3, 4)])[0]
RUN = run.sign_run(ALICE, DIGITS).blob[96:]
OFFER = offers.encode_offer(ALICE, BOB.peer_id, kind=offers.CHANNEL, body=DESCRIPTION.pack(), nonce=bytes(16), now=1.0)
ANSWER = offers.encode_answer(BOB, offers.decode_offer(OFFER, BOB.peer_id), body=DESCRIPTION.pack(), now=1.0)
CHECKPOINT = b"".join(
    checkpoint.encode_state({"version": 3, "module": {"weight": torch.ones(3)}, "none": None, "pairs": {1: 2.0}})
)


def signed(body: bytes, domain: bytes) -> bytes:
    """As somebody would sign it who wants it to be read further than its signature."""
    return ALICE.public_key + ALICE.sign(domain + body) + body


def fuzz_manifest(pick: random.Random) -> None:
    manifest.decode_manifest(mutate(pick, pick.choice(PARTS)) if pick.random() < 0.95 else value(pick))


def fuzz_manifest_at_a_holder(pick: random.Random) -> None:
    packed = msgpack.packb(pick.choice(PARTS))
    record = SignedRecord(bytes(32), None, ALICE.peer_id, 1, 1.0, mutate(pick, packed), False, b"")
    assert belongs_under_its_key(record) in (True, False)


def fuzz_reservation(pick: random.Random) -> None:
    claiming.decode_reservation(mutate(pick, RESERVATION) if pick.random() < 0.95 else value(pick))


def fuzz_run(pick: random.Random) -> None:
    body = mutate(pick, RUN)
    if pick.random() < 0.3:
        fields = msgpack.unpackb(RUN)
        fields[pick.choice(list(fields))] = value(pick)
        body = msgpack.packb(fields)
    run.RUNS.read(signed(body, run.RUNS.domain))


def fuzz_grants(pick: random.Random) -> None:
    decode, domain, good = pick.choice(
        (
            (grants.GRANTS.read, grants.GRANTS.domain, GRANT.blob),
            (grants.REVOCATIONS.read, grants.REVOCATIONS.domain, REVOCATIONS.blob),
            (grants.APPOINTMENTS.read, grants.APPOINTMENTS.domain, APPOINTMENT.blob),
        )
    )
    body = mutate(pick, good[96:])
    if pick.random() < 0.5:
        fields = msgpack.unpackb(good[96:])
        fields[pick.randrange(len(fields))] = value(pick)
        body = msgpack.packb(fields)
    decode(signed(body, domain))


def fuzz_status(pick: random.Random) -> None:
    body = status.encode_status(STATUS)
    body[pick.choice(list(body))] = value(pick)
    status.decode_status(body)


def fuzz_offers(pick: random.Random) -> None:
    samples: list[tuple[Callable[[object], object], dict[str, object]]] = [
        (offers.Description.unpack, DESCRIPTION.pack()),
        (offers.read_reverse, {"addresses": ["203.0.113.1:5"], "token": bytes(16)}),
        (offers.read_relay, {"relay": bytes(BOB.peer_id), "token": bytes(16)}),
    ]
    read, body = pick.choice(samples)
    body[pick.choice(list(body))] = value(pick)
    if pick.random() < 0.5:
        body = copy.deepcopy(body)
        if type(candidates := body.get("candidates")) is list:
            for candidate in candidates[:1]:
                if type(candidate) is list and candidate:
                    candidate[pick.randrange(len(candidate))] = value(pick)
    read(body if pick.random() < 0.95 else value(pick))


def fuzz_sealed_offers(pick: random.Random) -> None:
    payload = mutate(pick, pick.choice((OFFER, ANSWER))[64:])
    data = ALICE.sign(offers.CONTEXT + payload) + payload
    if pick.random() < 0.5:
        offers.decode_offer(data, BOB.peer_id)
    else:
        offers.decode_answer(data, OFFER, sender=BOB.peer_id, recipient=ALICE.peer_id)


def fuzz_stun(pick: random.Random) -> None:
    if pick.random() < 0.5:
        stun.answer(mutate(pick, stun.encode_request(bytes(12))), ("10.0.0.1", 5))
    else:
        stun.decode_response(
            mutate(pick, stun.answer(stun.encode_request(bytes(12)), (pick.choice(("10.0.0.1", "::1")), 5)) or b"")
        )


def fuzz_preamble(pick: random.Random) -> None:
    preamble.decode_preamble(mutate(pick, preamble.encode_preamble(preamble.RELAY, bytes(16))))


def fuzz_stream(pick: random.Random) -> None:
    one, other = (MessageStream() for _ in range(2))
    one.write(pick.randbytes(pick.choice((1, 5000))))
    if pick.random() < 0.3:
        one.finish()
    for message in one.messages_to_send(2**20):
        if isinstance(message, bytes):
            other.receive(mutate(pick, message))
        else:
            other.receive(mutate(pick, message.encode()).decode("utf-8", "replace"))
    for message in other.messages_to_send(2**20):
        one.receive(mutate(pick, message.encode()).decode("utf-8", "replace") if isinstance(message, str) else message)
    other.read_into(memoryview(bytearray(100)))


def fuzz_codecs(pick: random.Random) -> None:
    names = pick.choice((["none", "bf16"], ["of later"], [], value(pick)))
    CodecPolicy.decode({"inputs": names, "outputs": ["none", value(pick)], "gradients": ["uint8"]})


def fuzz_checkpoint(pick: random.Random) -> None:
    checkpoint.decode_state(mutate(pick, CHECKPOINT))


TARGETS: dict[str, tuple[Callable[[random.Random], None], int, int]] = {
    # target: inputs in the quick and in the slow run
    "manifest": (fuzz_manifest, 2000, 100_000),
    "manifest at a holder": (fuzz_manifest_at_a_holder, 2000, 100_000),
    "reservation": (fuzz_reservation, 2000, 50_000),
    "run": (fuzz_run, 300, 20_000),
    "grants": (fuzz_grants, 1000, 20_000),
    "status": (fuzz_status, 1000, 50_000),
    "offers": (fuzz_offers, 2000, 50_000),
    "sealed offers": (fuzz_sealed_offers, 300, 20_000),
    "stun": (fuzz_stun, 2000, 100_000),
    "preamble": (fuzz_preamble, 2000, 50_000),
    "stream": (fuzz_stream, 500, 50_000),
    "codecs": (fuzz_codecs, 1000, 20_000),
    "checkpoint": (fuzz_checkpoint, 300, 20_000),
}


def run_target(name: str, count: int, seed: str) -> None:
    target = TARGETS[name][0]
    expected = CheckpointError if name == "checkpoint" else ProtocolError
    accepted = 0
    for number in range(count):
        try:
            target(random.Random(f"{seed} {name} {number}"))
            accepted += 1
        except expected:
            pass
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed!r}, input {number}: {error!r}") from error
    assert accepted, "nothing was ever accepted: the fuzzer does not get past the gate"


@pytest.mark.parametrize("name", TARGETS)
def test_only_the_documented_error_comes_out(name: str) -> None:
    run_target(name, TARGETS[name][1], "quick")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", TARGETS)
def test_only_the_documented_error_comes_out_in_the_long_run(name: str) -> None:
    run_target(name, TARGETS[name][2], "slow")
