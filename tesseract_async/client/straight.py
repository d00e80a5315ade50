"""The straight way: a fast path for a small forward whose experts must all answer, such as one token's: one message to
each server, one answer from each, and their sum. No tasks, and a timer only where another server could be asked.

Most passes of a model that generates go this way. Whatever is unusual (an expert that nobody is known to host, a server
that is not connected, an error, an answer that is late, too old or not what was asked for) ends it, and the pass is
made anew by `mixture`, which knows what to do: a forward changes nothing, so it may be asked for twice.
"""

import asyncio
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import torch

from tesseract_async.client.experience import Experience, replica_key
from tesseract_async.client.expert_rpc import ExpertSchema
from tesseract_async.client.failover import HEDGE_SECONDS
from tesseract_async.client.settings import CallOptions
from tesseract_async.endpoint.events import CallFailed, PartReceived, ReplyEvent, ReplyReceived
from tesseract_async.errors import ProtocolError, TesseractError, TooStale
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.runtime.gradients import are_finite
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire.apply import APPLY, ApplyPart, ApplyRequest, decode_part, encode_request
from tesseract_async.wire.names import new_name
from tesseract_async.wire.tensors import TensorSpec, pack_tensors, unpack_plain

MAX_PAIRS: Final = 256
"""Pairs of a row and an expert: with more of them, the computing outweighs what is spared here."""
_CHOSEN_SECONDS: Final = 1.0
"""Seconds after which the fastest server of an expert that several host is looked for again."""
REST_SECONDS: Final = 1.0
"""Seconds for which no pass goes this way after one that failed."""
_AGAIN_SECONDS: Final = 1.0
"""Seconds of a timeout (of short ones a quarter) that are kept for making the pass anew, which finds silent servers."""


def seconds_for_another(timeout: float) -> float:
    """Return how much of a timeout is kept for making the pass anew."""
    return min(_AGAIN_SECONDS, timeout / 4)


class Servers:
    """The server to ask for each expert of a pool, worked out once for as long as that stays the same."""

    def __init__(
        self,
        experience: Experience,
        prefix: str,
        replicas: Mapping[tuple[int, ...], Sequence[ExpertReplica]],
        schema: ExpertSchema,
    ) -> None:
        """`replicas`: of the experts, by their number alone; all have this schema. On the loop."""
        now = asyncio.get_running_loop().time()
        self.prefix, self.replicas, self.schema = prefix, replicas, schema
        (answered, *_) = schema.output_specs
        self.sum_spec = TensorSpec(answered.least_shape, torch.promote_types(answered.dtype, torch.float32))
        self.server: dict[int, int] = {}
        """The number of the server to ask for each hosted expert."""
        self.first: dict[int, ExpertReplica] = {}
        """The replica of each expert on that server."""
        self.has_others: set[int] = set()
        """Experts that several servers host."""
        numbers: dict[PeerAddress, int] = {}
        fastest: dict[tuple[PeerAddress, ...], int] = {}  # many experts share their servers
        for (expert,), found in replicas.items():
            if len(found) > 1:
                peers = tuple([one.peer for one in found])
                if peers not in fastest:
                    best = experience.by_expectation(found, now, schema.row_bytes)[0]
                    fastest[peers] = peers.index(best.peer)
                self.has_others.add(expert)
                self.first[expert] = found[fastest[peers]]
            else:
                self.first[expert] = found[0]
            self.server[expert] = numbers.setdefault(self.first[expert].peer, len(numbers))
        self.renew_at = now + _CHOSEN_SECONDS if self.has_others else math.inf
        """The time from which others may be faster (the loop's)."""
        self.seen: dict[int, tuple[int, int]] = {}
        """Epochs and versions of the latest answers."""

    def take(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> bool:
        """Return whether a call with these arguments may go this way."""
        given, shape = self.schema.input_specs[0], index.shape
        return (
            x.dtype == given.dtype
            and x.shape[1:] == given.shape
            and index.dtype in (torch.int64, torch.int32)
            and weights.is_floating_point()
            and len(shape) == 2
            and shape == weights.shape
            and shape[0] == x.shape[0]
        )


class AskedServer:
    """One server of a pass: the request to it, encoded, and its answer while it comes."""

    __slots__ = (
        *("replicas", "request", "body", "buffers", "rows", "num_rows"),
        *("parts", "sums", "straight", "cancel", "is_open", "seconds", "_places"),
    )

    def __init__(
        self, replicas: list[ExpertReplica], request: ApplyRequest, tensors: list[memoryview], rows: list[int] | None
    ) -> None:
        """`rows`: those of the input that it covers; None: all."""
        self.replicas, self.request, self.rows, self.num_rows = replicas, request, rows, request.num_rows
        self.body, numbers = encode_request(request)
        self.buffers = (*numbers, *tensors)
        self.parts: list[ApplyPart] = []
        self.sums: list[tuple[list[int] | None, torch.Tensor]] = []
        """Rows of the batch (None: all), and sums for them."""
        self.straight: Straight
        self.cancel: Callable[[], None] = lambda: None
        self.is_open = False
        """True from when it is sent until the answer is there, or fails."""
        self.seconds = 0.0
        """The seconds that it took, once it is there."""
        self._places: set[int] = set()

    def heard(self, event: ReplyEvent) -> None:
        """Take in what comes of the call."""
        if not self.is_open:
            return
        if isinstance(event, CallFailed):
            self.is_open = False
            self.straight.end()
            return
        self.is_open = is_more = type(event) is PartReceived
        try:
            if is_more or not self._places or event.body is not None:
                self._take(event)
        except (ProtocolError, TesseractError):
            self.is_open = True  # it is cancelled
            self.straight.end()
            return
        if not is_more:
            if len(self._places) == len(self.replicas):
                self.straight.replied(self)
            else:
                self.straight.end()

    def _take(self, event: PartReceived | ReplyReceived) -> None:
        """Take in a part. Raises: ProtocolError for one that is not all that it should be."""
        request, spec = self.request, self.straight._servers.sum_spec
        part, buffers = decode_part(event.body, event.buffers, request)
        places = part.experts.tolist()
        if part.failures or not places or not self._places.isdisjoint(places):
            raise ProtocolError("not an answer of all that are asked")
        self._places.update(places)
        numbers = None if len(places) == len(request.ids) else request.rows_of(part.experts).tolist()
        rows, num_rows = self.rows, self.num_rows
        if numbers is not None and len(numbers) < num_rows:
            rows = numbers if rows is None else [rows[number] for number in numbers]
            num_rows = len(numbers)
        found = unpack_plain(part.tensors, buffers, (spec,), num_rows=num_rows)
        if found is None:
            raise ProtocolError("a server answered numbers that do not fit the schema")
        self.parts.append(part)
        self.sums.append((rows, found[0]))


def questions(
    servers: Servers, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> list[AskedServer] | None:
    """Return a question per server; None if `mixture` must make this pass. `index` and `weights` are unchecked."""
    shares: dict[int, dict[int, tuple[list[int], list[float]]]] = {}
    first, server, total = servers.first, servers.server, 0.0
    for row, (experts, by) in enumerate(zip(index.tolist(), weights.float().tolist(), strict=True)):
        for expert, weight in zip(experts, by, strict=True):
            number = server.get(expert)
            if number is None:
                return None
            total += weight
            asked = shares.setdefault(number, {})
            if (known := asked.get(expert)) is None:
                asked[expert] = [row], [weight]
            elif known[0][-1] == row:  # named twice
                return None
            else:
                known[0].append(row)
                known[1].append(weight)
    if not math.isfinite(total):
        return None
    num_rows, made = x.shape[0], []
    whole = pack_tensors((x,))
    for asked in shares.values():
        experts = sorted(asked)
        pairs = [asked[expert] for expert in experts]
        rows, numbers, (metas, buffers) = None, [row for one, _ in pairs for row in one], whole
        if num_rows > 1 and len(there := sorted({*numbers})) < num_rows:
            rows, places = there, {row: place for place, row in enumerate(there)}
            numbers = [places[row] for row in numbers]
            metas, buffers = pack_tensors((x[there],))
        request = ApplyRequest(
            prefix=servers.prefix,
            experts=np.array(experts, dtype=np.uint32)[:, None],
            ids=[new_name() for _ in experts],
            versions=np.zeros(len(experts), dtype=np.int64),
            offsets=np.array([0, *itertools.accumulate([len(one) for one, _ in pairs])]),
            rows=np.array(numbers, dtype=np.int32),
            weights=np.array([weight for _, by in pairs for weight in by], dtype=np.float32),
            tensors=metas,
            num_inputs=1,
            backward=False,
            training=False,
            keep=False,
            seed=0,
            reply_codec="none",
        )
        made.append(AskedServer([first[expert] for expert in experts], request, buffers, rows))
    return made


class Straight:
    """One pass. `begin` it on the node's loop, once."""

    def __init__(
        self,
        experience: Experience,
        servers: Servers,
        asked: list[AskedServer],
        *,
        num_rows: int,
        options: CallOptions,
        timeout: float,
        holds: Callable[[], bool],
    ) -> None:
        """`holds`: whether `servers` are what they were, asked on the loop."""
        self.answer: torch.Tensor | None = None
        """The sum, once it is over; None if the pass has to be made anew."""
        self.is_sent = False
        """True once somebody may have been asked."""
        self.is_late = False
        """True if it was ended to ask another server: one that is slow now and then will do for the next pass."""
        self.seconds = 0.0
        """The seconds that it took, once it is over."""
        self._experience, self._servers, self._asked = experience, servers, asked
        self._num_rows, self._options, self._timeout = num_rows, options, timeout
        self._holds = holds
        self._num_open = len(asked)
        self._done: Callable[[], object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._began = 0.0

    def begin(self, done: Callable[[], object]) -> None:
        """Send it; `done` is called when it is over."""
        self._done, loop = done, asyncio.get_running_loop()
        node, self._began = self._experience.node, loop.time()
        try:
            if not self._holds():
                self.end()
                return
            self.is_sent = True
            for question in self._asked:
                peer, uids = question.replicas[0].peer, [replica.uid for replica in question.replicas]
                endpoint = node.endpoint_towards(peer, APPLY, uids)
                if endpoint is None:  # this node itself
                    self.end()
                    return
                question.straight, question.is_open = self, True
                cancel = endpoint.call_into(
                    peer,
                    APPLY,
                    question.body,
                    question.buffers,
                    question.heard,
                    timeout=self._timeout,
                    priority=self._options.priority,
                )
                if cancel is None:  # not connected
                    self.end()
                    return
                question.cancel = cancel
        except Exception:  # it is met again, and told, where the pass is made anew
            self.end()
            return
        if self._servers.has_others and (wait := self._hedge_after()) is not None:
            self._timer = loop.call_later(wait, self._hedge)

    def _hedge_after(self) -> float | None:
        """Seconds after which another server of an expert is worth asking; None if there is none."""
        p95, others = self._experience.latencies.p95, self._servers.has_others
        known = [
            p95(replica_key(one))
            for question in self._asked
            for expert, one in zip(question.request.experts[:, 0].tolist(), question.replicas, strict=True)
            if expert in others
        ]
        return max([HEDGE_SECONDS if one is None else one for one in known], default=None)

    def _hedge(self) -> None:
        """End the pass, because another server is worth asking. Those that are silent would have taken at least this
        long."""
        for question in self._asked:
            if question.is_open:
                self._observe(question, asyncio.get_running_loop().time() - self._began, answered=False)
        self.is_late = True
        self.end()

    def end(self) -> None:
        """End it, with an answer if all are there. What is under way is given up."""
        if (done := self._done) is None:
            return
        self._done = None
        self.seconds = asyncio.get_running_loop().time() - self._began
        if self._timer is not None:
            self._timer.cancel()
        try:
            for question in self._asked:
                if question.is_open:
                    question.is_open = False
                    question.cancel()
            if not self._num_open:
                self._sum()
        finally:  # a thread waits for it
            self._asked = []  # they know this: a cycle full of tensors
            done()

    def replied(self, question: AskedServer) -> None:
        """All of one server's answer is there."""
        question.seconds = asyncio.get_running_loop().time() - self._began
        try:
            self._check_lineages(question)
        except TooStale:
            self.end()
            return
        self._num_open -= 1
        if not self._num_open:
            self.end()

    def _check_lineages(self, question: AskedServer) -> None:
        """Raises: TooStale for an answer that does not count."""
        lineages, seen, replicas = self._experience.lineages, self._servers.seen, question.replicas
        numbers = question.request.experts[:, 0].tolist()
        for part in question.parts:
            for place, epoch, version in zip(
                part.experts.tolist(), part.epochs.tolist(), part.versions.tolist(), strict=True
            ):
                if seen.get(numbers[place]) != (epoch, version):
                    lineages.take(replicas[place], epoch, version)
                    seen[numbers[place]] = epoch, version

    def _learn(self, question: AskedServer) -> None:
        """Learn from an answer that counts."""
        node, replicas = self._experience.node, question.replicas
        prefix, num_rows = self._servers.prefix.partition(".")[0], question.num_rows
        node.thanks.add(prefix, replicas[0].peer.peer_id, num_rows, 0)
        if self._servers.has_others:
            self._observe(question, question.seconds)
        if node.directory.has_doubts:
            for replica in replicas:
                node.directory.report_answer(replica)

    def _observe(self, question: AskedServer, seconds: float, *, answered: bool = True) -> None:
        """Note how long a server took over experts that others host, too."""
        experience, others = self._experience, self._servers.has_others
        num_bytes = question.num_rows * self._servers.schema.row_bytes
        path = experience.path_seconds(question.replicas[0], num_bytes)
        for expert, replica in zip(question.request.experts[:, 0].tolist(), question.replicas, strict=True):
            if expert in others:
                experience.latencies.observe(replica_key(replica), seconds, path=path, answered=answered)

    def _sum(self) -> None:
        total, spec = None, self._servers.sum_spec
        for question in self._asked:
            for rows, own in question.sums:
                if total is None and rows is None:
                    total = own
                    continue
                if total is None:
                    total = torch.zeros(self._num_rows, *spec.least_shape, dtype=spec.dtype, device="cpu")
                if rows is None:
                    total += own
                else:
                    total[rows] += own
        if total is not None and are_finite((total,)):
            self.answer = total.to(self._servers.schema.output_specs[0].dtype)
            for question in self._asked:
                self._learn(question)


def may_go(schema: ExpertSchema, options: CallOptions) -> bool:
    """Return whether calls with this schema and these options may go this way."""
    if len(schema.input_specs) != 1 or len(schema.output_specs) != 1 or options.audit_share:
        return False
    if options.max_staleness is not None:
        return False
    given, answered = schema.input_specs[0], schema.output_specs[0]
    codecs = schema.settle(options.codecs)
    return (
        not (given.varies or given.optional or answered.varies)
        and answered.dtype.is_floating_point
        and codecs.inputs == codecs.outputs == "none"
    )
