"""Audits: a share of the experts' answers is computed again elsewhere, to find servers that answer wrongly.

If two replicas of one version differ, both are asked again: the one that contradicts itself is caught; otherwise a
third one decides.
"""

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from random import Random
from typing import Final

import torch

from tesseract_async.client.expert_rpc import Forward, Receipt, call_forward
from tesseract_async.client.ports import Node
from tesseract_async.errors import TesseractError
from tesseract_async.identity import PeerID
from tesseract_async.tasks import TaskSet
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire.codecs import settle

logger = logging.getLogger(__name__)

Inputs = Sequence[torch.Tensor | None]
Outputs = Sequence[torch.Tensor]

MAX_PENDING_BYTES: Final = 64 << 20
MAX_FINDINGS: Final = 256
TOLERANCES: Final = {
    "none": 0.03,
    "fp16": 0.03,
    "bf16": 0.04,
    "uint8_blockwise": 0.08,
    "uint8": 0.2,
    "int4_blockwise": 0.3,
}
"""The deviation below which answers count as equal, by the codec in which the outputs came. Kernels, threads, devices
and autocast to bf16 stay below .01; see `tests/benchmarks/client_audits.py`."""
_HALF_TOLERANCE: Final = 0.04
"""The deviation below which answers count as equal, for outputs that are 16 bits wide."""


class Verdict(Enum):
    AGREED = "agreed"
    CAUGHT = "caught"
    DISPUTED = "disputed"
    """Two replicas stick to different answers, and no third one can decide."""
    UNREPEATABLE = "unrepeatable"
    """The expert answers the same question differently everywhere, so nothing can be concluded."""
    UNCHECKED = "unchecked"
    """No other replica was at that version, or none answered."""
    SKIPPED = "skipped"
    """Too many bytes were waiting for audits already."""


@dataclass(frozen=True, slots=True)
class AuditFinding:
    """Evidence of one audit that found a difference."""

    verdict: Verdict
    uid: str
    peers: tuple[PeerID | None, ...]
    """Peer ids: the one that was caught, or both of a dispute."""
    version: int
    seed: int
    training: bool
    deviation: float
    """The distance between the two answers, as `deviation` measures it."""
    tolerance: float
    when: float
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True)
class _Sample:
    forward: Forward
    receipt: Receipt
    inputs: Inputs
    outputs: Outputs
    timeout: float


class Audits:
    """The audits of one node's calls, at the share that the calls' options set."""

    def __init__(self, node: Node, *, random: Random | None = None) -> None:
        self._node = node
        self.outcomes: Counter[Verdict] = Counter()
        self.findings: deque[AuditFinding] = deque(maxlen=MAX_FINDINGS)
        """The latest differences, the newest last."""
        self.random = random or Random()
        """Decides which answers are audited: a seeded one makes an experiment repeatable."""
        self._tasks = TaskSet("client: audit")
        self._num_pending_bytes = 0
        self._unrepeatable: set[tuple[str, bool]] = set()
        self._closes = False

    def consider(self, forward: Forward, receipt: Receipt, inputs: Inputs, outputs: Outputs, *, timeout: float) -> None:
        """Audit this answer in the background with the probability that its options name."""
        if self.draws(forward):
            self.check(forward, receipt, inputs, outputs, timeout=timeout)

    def draws(self, forward: Forward) -> bool:
        """Return whether this answer is to be audited: with the probability that its options name."""
        is_drawn = self.random.random() < forward.options.audit_share
        return is_drawn and (forward.uid, forward.mode.training) not in self._unrepeatable

    def check(self, forward: Forward, receipt: Receipt, inputs: Inputs, outputs: Outputs, *, timeout: float) -> None:
        num_bytes = sum(x.nbytes for x in (*inputs, *outputs) if x is not None)
        if self._num_pending_bytes + num_bytes > MAX_PENDING_BYTES:
            self._count(Verdict.SKIPPED)
            return
        if not self._closes:
            self._closes = True
            self._node.at_close(self.aclose)
        # copies: the caller may change its tensors as soon as it has the answer
        given = [None if x is None else x.detach().clone() for x in inputs]
        answered = [x.detach().clone() for x in outputs]
        forward = forward._replace(mode=forward.mode._replace(differentiable=False))
        sample = _Sample(forward, receipt, given, answered, timeout)
        self._num_pending_bytes += num_bytes
        self._tasks.spawn(self._audit(sample, num_bytes))

    async def wait(self) -> None:
        await self._tasks.wait_done()

    async def aclose(self) -> None:
        await self._tasks.aclose()

    def _count(self, verdict: Verdict) -> None:
        self.outcomes[verdict] += 1
        self._node.metrics.count("audits", verdict=verdict.value)

    async def _audit(self, sample: _Sample, num_bytes: int) -> None:
        try:
            self._count(await self._verdict(sample))
        finally:
            self._num_pending_bytes -= num_bytes

    async def _verdict(self, sample: _Sample) -> Verdict:
        others = [replica.peer for replica in self._node.directory.known(sample.forward.uid)]
        others = [peer for peer in others if peer.peer_id != sample.receipt.peer.peer_id]
        self.random.shuffle(others)
        while others:
            other = others.pop()
            theirs = await self._ask(sample, other)
            if theirs is not None:
                return await self._decide(sample, other, theirs, others) if _differ(sample, theirs) else Verdict.AGREED
        return Verdict.UNCHECKED

    async def _decide(
        self, sample: _Sample, other: PeerAddress, theirs: Outputs, others: Sequence[PeerAddress]
    ) -> Verdict:
        """Decide which of two peers is wrong: one that contradicts itself, or else one that a third peer
        contradicts."""
        again, theirs_again = await asyncio.gather(self._ask(sample, sample.receipt.peer), self._ask(sample, other))
        lies = again is not None and _differ(sample, again)
        they_lie = theirs_again is not None and deviation(theirs, theirs_again) > tolerance(sample.forward, theirs)
        if lies and they_lie:
            # neither repeats itself: the module draws random numbers that the seed does not set
            self._unrepeatable.add((sample.forward.uid, sample.forward.mode.training))
            return Verdict.UNREPEATABLE
        if not lies and not they_lie:
            for third in others:
                answer = await self._ask(sample, third)
                if answer is not None:
                    agrees = not _differ(sample, answer)
                    agrees_with_them = deviation(theirs, answer) <= tolerance(sample.forward, theirs)
                    lies, they_lie = agrees_with_them and not agrees, agrees and not agrees_with_them
                    if lies or they_lie:
                        break
        if lies or they_lie:
            culprit = (sample.receipt.peer if lies else other).peer_id
            self._note(Verdict.CAUGHT, sample, theirs, (culprit,))
            if culprit is not None:
                self._node.distrust(culprit, f"it answered wrongly for {sample.forward.uid}")
            return Verdict.CAUGHT
        if sample.forward.mode.training and await self._agree_in_eval_mode(sample, other):
            # their random numbers differ, as those of a CPU and a GPU do: no sign of a lie
            self._unrepeatable.add((sample.forward.uid, True))
            return Verdict.UNREPEATABLE
        self._note(Verdict.DISPUTED, sample, theirs, (sample.receipt.peer.peer_id, other.peer_id))
        return Verdict.DISPUTED

    async def _agree_in_eval_mode(self, sample: _Sample, other: PeerAddress) -> bool:
        forward = sample.forward._replace(mode=sample.forward.mode._replace(training=False))
        calm = replace(sample, forward=forward)
        ours, theirs = await asyncio.gather(self._ask(calm, sample.receipt.peer), self._ask(calm, other))
        return ours is not None and theirs is not None and deviation(ours, theirs) <= tolerance(forward, ours)

    def _note(self, verdict: Verdict, sample: _Sample, theirs: Outputs, peers: tuple[PeerID | None, ...]) -> None:
        forward = sample.forward
        finding = AuditFinding(
            verdict,
            forward.uid,
            peers,
            sample.receipt.version,
            forward.mode.seed,
            forward.mode.training,
            deviation(sample.outputs, theirs),
            tolerance(forward, sample.outputs),
            time.time(),
        )
        self.findings.append(finding)
        logger.warning(
            "audit of %s at version %d: %s %s; the answers differ by %.2g of their size",
            forward.uid,
            sample.receipt.version,
            " and ".join("an unknown peer" if peer is None else peer.short for peer in peers),
            "answered wrongly" if verdict is Verdict.CAUGHT else "contradict each other",
            finding.deviation,
        )

    async def _ask(self, sample: _Sample, peer: PeerAddress) -> Outputs | None:
        """Return this peer's answer to the same question, at the same version; None if it gives none."""
        try:
            outputs, receipt = await call_forward(
                self._node, sample.forward, peer, sample.inputs, timeout=sample.timeout
            )
        except (TesseractError, TimeoutError, RuntimeError):
            return None
        return outputs if receipt.version == sample.receipt.version else None


def deviation(left: Outputs, right: Outputs) -> float:
    """Return how far two answers are apart: the largest distance of a row, relative to its size and that of rows in
    general. So a single wrong row is not lost among many, and a row near zero does not count for much.
    """
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if not a.numel():
            continue
        a, b = (torch.view_as_real(x) if x.is_complex() else x for x in (a, b))
        rows = [x.reshape(len(x), -1).double() for x in (a, b)]
        if not all(bool(torch.isfinite(x).all()) for x in rows):
            worst = max(worst, 0.0 if torch.equal(rows[0].nan_to_num(), rows[1].nan_to_num()) else math.inf)
            continue
        sizes = torch.maximum(rows[0].norm(dim=1), rows[1].norm(dim=1))
        usual = sizes.square().mean().sqrt()
        if float(usual):
            worst = max(worst, float(((rows[0] - rows[1]).norm(dim=1) / (0.5 * (sizes + usual))).max()))
    return worst


def tolerance(forward: Forward, outputs: Outputs) -> float:
    """The deviation below which two answers count as equal, by how the outputs travel and by their dtype."""
    codec = settle(forward.schema.codecs, forward.options.codecs).outputs
    halves = any(x.dtype in (torch.float16, torch.bfloat16) for x in outputs)
    return max(TOLERANCES[codec], _HALF_TOLERANCE if halves else 0.0)


def _differ(sample: _Sample, answer: Outputs) -> bool:
    return deviation(sample.outputs, answer) > tolerance(sample.forward, sample.outputs)
