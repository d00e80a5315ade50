"""Experience: the things that one node's calls have taught about servers, shared by its modules."""

import asyncio
import contextlib
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch

from tesseract_async.client.audits import Audits
from tesseract_async.client.dispatch import CallsUnderWay, Direction, ExpertCall
from tesseract_async.client.latency import FIRST_GRACE_SECONDS, LatencyBook, Patience
from tesseract_async.client.lineages import Lineages
from tesseract_async.client.ports import Node, PlainCalls
from tesseract_async.client.settings import MixtureSettings
from tesseract_async.errors import ConnectionLost, PeerUnreachable, SchemaMismatch, summarize
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.experts.manifest import Coordinates, split_uid
from tesseract_async.lru import LRU
from tesseract_async.metrics import Metrics
from tesseract_async.transport.base import PeerAddress
from tesseract_async.uncopied import Uncopied

logger = logging.getLogger(__name__)

LOOK_EVERY_SECONDS: Final = 0.05
"""A stall shorter than this may go unseen."""
SAY_EVERY_SECONDS: Final = 60.0
_GONE = (PeerUnreachable, ConnectionLost)
_MAX_IGNORED: Final = 256
_MAX_STRIKES: Final = 3
_STRIKE_SECONDS: Final = 1.0
"""An expert that was waited for in vain this often in a row, and for this long together, counts as failed."""
_SMOOTHING: Final = 0.2
_MAX_GRACE_SECONDS: Final = 1.0
_GRACE_SHARE: Final = 0.05


def experience_of(given: Node | PlainCalls) -> "Experience":
    """Return the node's `Experience`, which is made when it is first asked for."""
    node = given.node if isinstance(given, PlainCalls) else given
    if not isinstance(node.client_state, Experience):
        node.client_state = Experience(node)
    return node.client_state


def replica_key(replica: ExpertReplica) -> tuple[str, object]:
    """The key of a replica's latencies: the expert and the server, not its address."""
    return replica.uid, replica.peer.peer_id


class Experience(Uncopied):
    _called = "a remote expert or a gate"

    def __init__(self, node: Node) -> None:
        self.node = node
        self.audits = Audits(node)
        self.latencies = LatencyBook()
        self.stalls = Stalls()
        self.left_out = LeftOut(node.metrics)
        self.lineages = Lineages(node)
        self._grace: dict[Direction, float] = {"forward": _MAX_GRACE_SECONDS, "backward": _MAX_GRACE_SECONDS}
        """Seconds for which late answers are waited for. They fall to 0 once one was waited for in vain, and each pass
        in which all experts answered gives a share of its time back: experts that always hang cost no more."""
        self._ignored: LRU[object, None] = LRU(_MAX_IGNORED)
        """Servers that host something else under a uid than others do; the latest ones."""

    def path_seconds(self, replica: ExpertReplica, num_bytes: float) -> float:
        """Seconds that `num_bytes`, both ways together, are on their way to and from this replica: 0.0 where nothing is
        known of the path."""
        round_trip, bytes_per_second = self.node.path(replica.peer) or (0.0, 0.0)
        return round_trip + (num_bytes / bytes_per_second if bytes_per_second > 0 else 0.0)

    def by_expectation(
        self, replicas: Sequence[ExpertReplica], now: float, num_bytes: float, *, primary_first: bool = False
    ) -> list[ExpertReplica]:
        """Return the replicas in order: those neither blocked nor in doubt first, then (with `primary_first`) the
        primary, then the fastest. Unknown ones count as idle, so that they become known."""

        def order(replica: ExpertReplica) -> tuple[bool, int, bool, float]:
            key, path = replica_key(replica), self.path_seconds(replica, num_bytes)
            expected = self.latencies.expected(key, path=path)
            is_second = primary_first and not replica.primary
            return self.latencies.is_blocked(key, now), replica.doubt, is_second, path if expected is None else expected

        return sorted(replicas, key=order)

    def ignore(self, replica: ExpertReplica, mismatch: SchemaMismatch) -> None:
        """Ignore a replica that hosts something other under its uid than the other servers do. Logs one line for each
        server."""
        if (peer := replica.peer.peer_id) not in self._ignored:
            logger.warning(
                "ignoring the replica of %s at %s (and others there), which takes something else than the primary: %s",
                replica.uid,
                "an unknown peer" if peer is None else peer.short,
                mismatch,
            )
            self._ignored[peer] = None
        self.node.directory.report_failure(replica, reason="schema")

    def patience(self, direction: Direction, settings: MixtureSettings) -> Patience:
        """Return the shares beyond what is usual after which a call is slow: as set, or as learned."""
        if (known := settings.patience) is not None:
            return Patience(known, known)
        book = self.latencies
        return Patience(book.lateness_alone[direction].patience, book.lateness[direction].patience)

    def expect_forward(
        self, call: ExpertCall, replicas: Sequence[ExpertReplica], num_bytes: int, settings: MixtureSettings
    ) -> None:
        """Set in `call` how long it usually takes, and how long to wait for it beyond that."""
        is_new, call.expected = True, None
        for replica in replicas:
            key = replica_key(replica)
            if (usual := self.latencies.usual(key, path=self.path_seconds(replica, num_bytes))) is not None:
                call.expected = usual if call.expected is None else min(usual, call.expected)
            is_new = is_new and self.latencies.expected(key) is None
        self._set_grace(call, "forward", is_new, settings, settings.forward_timeout)

    def expect_backward(self, call: ExpertCall, replicas: Sequence[ExpertReplica], settings: MixtureSettings) -> None:
        """Do the same for the call of its gradient."""
        key = call.uid, "backward"
        call.expected = self.latencies.usual(key)
        # of several that claim to be the primary, those that are silent are found out within the longer time
        is_new = self.latencies.expected(key) is None or sum([replica.primary for replica in replicas]) > 1
        self._set_grace(call, "backward", is_new, settings, settings.backward_timeout)

    def _set_grace(
        self, call: ExpertCall, direction: Direction, is_new: bool, settings: MixtureSettings, timeout: float
    ) -> None:
        if settings.patience is None:
            call.grace = min(FIRST_GRACE_SECONDS if is_new else self._grace[direction], timeout / 3)

    def learn(self, calls: CallsUnderWay, seconds: float) -> None:
        """Learn from a pass that took this long: how far its answers scattered, and who was waited for in vain."""
        direction, late = calls.direction, calls.late
        ended = [*calls.answers, *late]
        seen = [call.seconds for call in ended]
        self.latencies.lateness[direction].observe(seen, calls.usual_seconds(ended))
        self.latencies.lateness_alone[direction].observe(seen, [call.expected for call in ended])
        if direction == "backward":
            for some, answered in ((calls.answers, True), (late, False)):
                for call in some:
                    self.latencies.observe((call.uid, direction), call.seconds, answered=answered)
        if late:
            self._grace[direction] = 0.0
        elif not calls.given_up:
            self._grace[direction] = min(_MAX_GRACE_SECONDS, self._grace[direction] + _GRACE_SHARE * seconds)
        if not calls.is_strict:
            self.left_out.note(direction, calls.left_out)


class GridExperience:
    """The lessons of one gate and its copies about the experts of their grid."""

    def __init__(self, experience: Experience) -> None:
        self._of_node = experience
        self._seconds: dict[tuple[int, ...], float] = {}
        """By coordinates, how long a forward takes beyond the way there and back."""
        self._num_bytes = 0.0
        """The usual size of one forward to one expert, both ways together."""
        self._strikes: dict[tuple[int, ...], tuple[int, float]] = {}
        """Times that experts were waited for in vain since their last answer, and the seconds of that together."""

    def bias(
        self, coords_ND: Coordinates, replicas: Mapping[tuple[int, ...], Sequence[ExpertReplica]], weight: float
    ) -> torch.Tensor | None:
        """The bias of the live experts' scores: ``-weight`` for every second that each is expected to take."""
        if not weight:
            return None
        paths: dict[PeerAddress, float] = {}  # many experts share a server
        seconds = []
        for coords in map(tuple, coords_ND.tolist()):
            for replica in replicas[coords]:
                if replica.peer not in paths:
                    paths[replica.peer] = self._of_node.path_seconds(replica, self._num_bytes)
            fastest = min(paths[replica.peer] for replica in replicas[coords])
            seconds.append(self._seconds.get(coords, 0.0) + fastest)
        return torch.tensor(seconds, device="cpu") * -weight

    def learn(self, calls: CallsUnderWay, row_bytes: int) -> None:
        """Learn from a forward: latencies, replicas of another schema, and experts that never answer, which count as
        failed in the end."""
        candidates, directory = calls.candidates, self._of_node.node.directory
        for ended, has_answered in ((calls.answers, True), (calls.given_up, False)):
            for call in ended:
                coords, num_bytes = candidates.coords(call.expert), row_bytes * len(call.rows)
                paths = [self._of_node.path_seconds(r, num_bytes) for r in candidates.replicas_of(call.expert)]
                beyond = max(0.0, call.seconds - (paths[0] if len(paths) == 1 else min(paths)))
                known = self._seconds.get(coords, beyond)
                if not has_answered:
                    beyond = max(beyond, known)  # it takes longer than that
                self._seconds[coords] = known + _SMOOTHING * (beyond - known)
                self._num_bytes += _SMOOTHING * (num_bytes - self._num_bytes)
        for uid, error in calls.errors.items() if calls.answers else ():
            if isinstance(error, SchemaMismatch):
                for replica in candidates.replicas[split_uid(uid)[1]]:
                    self._of_node.ignore(replica, error)
        for call in calls.answers:
            self._strikes.pop(candidates.coords(call.expert), None)
        for call in calls.late:
            coords = candidates.coords(call.expert)
            num, seconds = self._strikes.get(coords, (0, 0.0))
            self._strikes[coords] = num, seconds = num + 1, seconds + call.seconds
            if num >= _MAX_STRIKES and seconds >= _STRIKE_SECONDS:
                del self._strikes[coords]
                for replica in candidates.replicas_of(call.expert):
                    directory.report_failure(replica)


class LeftOut:
    """The answers and gradients that the mixtures of one node went on without: counted, and logged now and then."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._since: dict[int, Counter[str]] = {logging.INFO: Counter(), logging.WARNING: Counter()}
        self._said_at = dict.fromkeys(self._since, -math.inf)

    def note(self, direction: Direction, errors: Mapping[str, BaseException]) -> None:
        """Note that a pass ended without these experts: uid -> why. Each counts in the metric ``answers_left_out``.

        At most once a minute, the log gets a warning about those that live, and a line at INFO about those that do not.
        """
        for error in errors.values():
            reason = "late" if isinstance(error, TimeoutError) else type(error).__name__
            self._metrics.count("answers_left_out", way=direction, reason=reason)
        gone = {uid: error for uid, error in errors.items() if isinstance(error, _GONE)}
        self._say(logging.INFO, direction, gone)
        self._say(logging.WARNING, direction, {uid: error for uid, error in errors.items() if uid not in gone})

    def _say(self, level: int, direction: Direction, errors: Mapping[str, BaseException]) -> None:
        since = self._since[level]
        since[direction] += len(errors)
        now = asyncio.get_running_loop().time()
        if errors and now >= self._said_at[level] + SAY_EVERY_SECONDS:
            answers, gradients = _counted(since["forward"], "answer"), _counted(since["backward"], "gradient")
            went_without = " and ".join(filter(None, (answers, gradients)))
            logger.log(level, "gates went on without %s: %s", went_without, summarize(errors))
            since.clear()
            self._said_at[level] = now


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}" if number else ""


class Stalls:
    """Measures the time for which one event loop stood still, while it is watched: it heard no answers then."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._num_watching = 0
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Count `seconds` within this context."""
        self._num_watching += 1
        if self._timer is None:
            self._look()
        try:
            yield
        finally:
            self._num_watching -= 1
            if not self._num_watching and self._timer is not None:
                self._seconds = self.seconds
                self._timer.cancel()
                self._timer = None

    @property
    def seconds(self) -> float:
        """All stalls so far, the present one included: their sum grows while the loop stands still."""
        if self._timer is None:
            return self._seconds
        return self._seconds + max(0.0, asyncio.get_running_loop().time() - self._due)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        self._seconds = self.seconds
        self._due = loop.time() + LOOK_EVERY_SECONDS
        self._timer = loop.call_at(self._due, self._look)
