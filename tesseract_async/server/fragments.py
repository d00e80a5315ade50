"""Fragments of shared parameters, hosted like experts: their state as a backend, and how others follow it.

A `FragmentBackend` has no module that computes: its module holds the fragment's tensors, so that checkpoints,
followers, Seals and transfers take it for any expert. `server.fragment_calls` answers the trainers.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

import torch
from torch import nn

from tesseract_async.errors import ProtocolError, describe
from tesseract_async.experts.manifest import split_uid
from tesseract_async.identity import PeerID
from tesseract_async.node import TesseractNode
from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.states import JOURNAL_LENGTH, StateDict
from tesseract_async.server.answering import journal_key
from tesseract_async.server.checkpoint import check_state
from tesseract_async.server.hosted import UNFIT
from tesseract_async.sharing.fragment import KEPT_UPDATES, LAST, NEWCOMERS, ROOT_BYTES, Fragment, Update
from tesseract_async.sharing.layout import MAX_ELEMENTS, MAX_LAYOUT_BYTES, MergeKind, is_finite
from tesseract_async.sharing.manifest import FragmentPart, SharedManifest
from tesseract_async.sharing.rounds import Push, Rounds
from tesseract_async.sharing.samples import (
    STATE_BYTES,
    Ledger,
)
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import messages
from tesseract_async.wire.compression import encoded_bytes
from tesseract_async.wire.tensors import TensorSpec

MAX_STEPS: Final = 1024
"""The most optimizer steps that a push counts as."""
JOURNALED_VERSIONS: Final = 64
"""Versions whose pushes are remembered. Those whose base is older than 8 versions are not counted anyway."""

MAX_STATE_BYTES: Final = (16 + 8 * KEPT_UPDATES) * MAX_ELEMENTS + 2 * MAX_LAYOUT_BYTES
"""The most bytes of a file with a fragment's state."""
_SAMPLES_BYTES: Final = 4 + STATE_BYTES

NamedTensors = Mapping[str, torch.Tensor]


class _Tensors(nn.Module):
    """The state of a fragment, as tensors whose shapes follow from the manifest."""

    def __init__(self, part: FragmentPart, fragment: Fragment, steps: int) -> None:
        super().__init__()
        num_bytes = encoded_bytes(part.cut.numel, part.cut.dtype, part.outer.codec_of(part.cut))
        self.register_buffer("anchor", fragment.anchor.clone())
        if fragment.has_momentum:
            self.register_buffer("momentum", fragment.momentum)
        # the update that led to version v lies in row v % 8, its root in row v % 9
        self.register_buffer("updates", torch.zeros(KEPT_UPDATES, num_bytes, dtype=torch.uint8))
        self.register_buffer("roots", torch.zeros(KEPT_UPDATES + 1, ROOT_BYTES, dtype=torch.uint8))
        self.register_buffer("counts", torch.tensor([steps, len(fragment.updates)]))
        self.register_buffer("manifest", _octets(part.data))
        if part.number == 0:
            self.register_buffer("samples", torch.zeros(_SAMPLES_BYTES, dtype=torch.uint8))
        self.put_root(fragment.version - len(fragment.updates), fragment.before)
        for update in fragment.updates:
            self.put(update)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows as they came: only an expert's module is ever run."""
        return x

    def put(self, update: Update) -> None:
        self.get_buffer("updates")[update.version % KEPT_UPDATES] = _octets(update.data)
        self.put_root(update.version, update.root)

    def read_samples(self) -> bytes:
        """Return the state of the samples when the last round closed; empty for fragments other than the first."""
        return _read_samples(self.get_buffer("samples")) if "samples" in self._buffers else b""

    def put_samples(self, state: bytes) -> None:
        """Store the state of the samples, in the first fragment."""
        if "samples" in self._buffers:
            self.samples = _octets((len(state).to_bytes(4, "big") + state).ljust(_SAMPLES_BYTES, b"\0"))

    def put_root(self, version: int, root: bytes) -> None:
        self.get_buffer("roots")[version % (KEPT_UPDATES + 1)] = _octets(root)


def _octets(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _read_samples(tensor: torch.Tensor) -> bytes:
    data = tensor.numpy().tobytes()
    return data[4 : 4 + int.from_bytes(data[:4], "big")]


def read_manifest(tensors: NamedTensors) -> SharedManifest:
    """Return the manifest in the state of fragment 0. Untrusted. Raises: ProtocolError."""
    return SharedManifest.decode(_said(tensors))


def read_part(uid: str, tensors: NamedTensors) -> FragmentPart:
    """Return what the state of a fragment says of it. Untrusted. Raises: ProtocolError."""
    return FragmentPart.read(split_uid(uid)[1][0], _said(tensors))


def _said(tensors: NamedTensors) -> bytes:
    said = tensors.get("manifest")
    if said is None or said.dtype != torch.uint8:
        raise ProtocolError("the state of a fragment that does not say of which model")
    return said.numpy().tobytes()


def read_fragment(part: FragmentPart, tensors: NamedTensors, version: int) -> tuple[Fragment, int]:
    """Return the fragment in the tensors of a state, or in those of `NEWCOMERS`, and the steps that were pushed to it.

    Untrusted. The tensors become the fragment's. Raises: ProtocolError.
    """
    cut, outer = part.cut, part.outer
    num_bytes = encoded_bytes(cut.numel, cut.dtype, outer.codec_of(cut))
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    shapes = {"anchor": (cut.dtype, (cut.numel,)), "counts": (torch.int64, (2,))}
    has_momentum = cut.kind is MergeKind.STEPPED and outer.momentum > 0
    if is_whole := not NEWCOMERS <= tensors.keys() <= NEWCOMERS | {LAST}:
        shapes["updates"] = torch.uint8, (KEPT_UPDATES, num_bytes)
        shapes["roots"] = torch.uint8, (KEPT_UPDATES + 1, ROOT_BYTES)
        if part.number == 0:
            shapes["samples"] = torch.uint8, (_SAMPLES_BYTES,)
    elif has_momentum:
        shapes[LAST] = torch.uint8, (num_bytes,)
    for name, wanted in shapes.items():
        found = tensors.get(name)
        if found is None or (found.dtype, tuple(found.shape)) != wanted:
            raise ProtocolError(f"the state of a fragment has another {name}")
    steps, num_updates = tensors["counts"].tolist()
    if _said(tensors) != part.data:
        raise ProtocolError("a fragment of another model")
    if part.number == 0 and is_whole:
        Ledger(_read_samples(tensors["samples"]))
    if not 0 <= num_updates <= min(KEPT_UPDATES, version) or not 0 <= steps < 2**62:
        raise ProtocolError("the state of a fragment has other counts")
    if not is_whole:
        fragment = Fragment(cut, outer, tensors["anchor"], version=version)
        if has_momentum and num_updates:
            last = Update(version, tensors[LAST].numpy().tobytes(), fragment.root)
            fragment = Fragment(cut, outer, tensors["anchor"], version=version, updates=[last])
            if not is_finite(fragment.merged()):  # no root proves it
                raise ProtocolError("the last update of a fragment is not finite")
        return fragment, steps

    def root(at: int) -> bytes:
        return tensors["roots"][at % (KEPT_UPDATES + 1)].numpy().tobytes()

    updates = [
        Update(at, tensors["updates"][at % KEPT_UPDATES].numpy().tobytes(), root(at))
        for at in range(version - num_updates + 1, version + 1)
    ]
    fragment = Fragment(
        *(cut, outer, tensors["anchor"]),
        version=version,
        momentum=tensors.get("momentum"),
        updates=updates,
        before=root(version - num_updates),
    )
    return fragment, steps


def holds_push(state: StateDict, peer: PeerID, call_id: bytes) -> bool:
    """Return whether a push of this peer has counted in the whole state of a fragment. Untrusted."""
    ids, key = state["applied"].get("ids"), journal_key(peer, call_id)
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.uint8:
        return False
    keys = ids.numpy().tobytes()
    return any(keys[at : at + len(key)] == key for at in range(0, len(keys), len(key)))


class FragmentBackend(ExpertBackend):
    """A fragment that a server hosts. It stays on the CPU, and takes its steps on the runtime's thread."""

    def __init__(self, part: FragmentPart, fragment: Fragment, *, steps: int = 0) -> None:
        """`steps`: of all members, that `fragment` holds."""
        self.part, self.fragment, self.steps = part, fragment, steps
        self._tensors = _Tensors(part, fragment, steps)
        super().__init__(self._tensors, args_schema=(TensorSpec((1,)),), max_batch_size=2)
        self.recent: dict[int, tuple[int, bytes, bytes]] = {}
        """By version: `steps` then, the journal's keys of the pushes that led there, and the state of the samples, as
        other hosts must know."""
        self.num_followed = 0
        """The number of times that it went on from another host's state."""
        self._take(fragment, steps)

    @classmethod
    def of_file(cls, uid: str, file: bytes | memoryview) -> "FragmentBackend":
        """Return the fragment in the file of a whole state. Untrusted. Raises: ProtocolError."""
        state = check_state(uid, file)
        part, tensors = read_part(uid, state["module"]), {name: one.clone() for name, one in state["module"].items()}
        fragment, steps = read_fragment(part, tensors, state["version"])
        found = cls(part, fragment, steps=steps)
        try:
            found.load_state(state)
        except UNFIT as error:
            raise ProtocolError(f"{uid}: a state that does not fit: {describe(error)}") from None
        return found

    def _take(self, fragment: Fragment, steps: int) -> None:
        self.fragment, self.steps, self.version = fragment, steps, fragment.version

    def to(self, device: torch.device) -> None:
        """Stay where it is: a step is a few sums, and its bits are the same on every CPU."""

    def load_state(self, state: StateDict) -> None:
        """Continue from what `state` returned. Raises: ValueError, RuntimeError or KeyError if it does not fit."""
        super().load_state(state)
        tensors = {name: tensor.clone() for name, tensor in self._tensors.state_dict().items()}
        try:
            self._take(*read_fragment(self.part, tensors, state["version"]))
            self.num_followed += 1
        except ProtocolError as error:
            raise ValueError(str(error)) from error

    @property
    def samples(self) -> bytes:
        """The state of the samples when the last round closed."""
        return self._tensors.read_samples()

    def close_round(self, rounds: Rounds, pushes: Sequence[Push], samples: bytes = b"") -> None:
        fragment = self.fragment
        update = fragment.step(rounds.merge(pushes, fragment))
        steps = self.steps + sum(min(max(1, push.steps), MAX_STEPS) for push in pushes)
        self._stepped(update, steps, b"".join(journal_key(push.peer, push.call_id) for push in pushes), samples)

    def replay(self, updates: Sequence[Update], journal: Sequence[tuple[int, bytes, bytes]]) -> None:
        """Take steps that the primary took, with `recent` of each. Raises: ProtocolError; the rest is not taken."""
        for update, row in zip(updates, journal, strict=True):
            if update.version > self.version:
                self.fragment.replay([update])
                self._stepped(update, *row)
                self.num_followed += 1

    def _stepped(self, update: Update, steps: int, keys: bytes, samples: bytes) -> None:
        fragment, tensors = self.fragment, self._tensors
        self.steps = steps
        tensors.anchor = fragment.anchor
        if fragment.has_momentum:
            assert fragment.momentum is not None
            tensors.momentum = fragment.momentum
        tensors.put(update)
        tensors.counts = torch.tensor([self.steps, len(fragment.updates)])
        tensors.put_samples(samples)
        self.version = fragment.version
        self.recent[self.version] = steps, keys, samples
        self.recent.pop(self.version - KEPT_UPDATES, None)
        for at in range(0, len(keys), 16):
            self.applied[keys[at : at + 16]] = self.version
        oldest = self.version - JOURNALED_VERSIONS
        while len(self.applied) > JOURNAL_LENGTH or (self.applied and next(iter(self.applied.values())) <= oldest):
            self.applied.popitem(last=False)


Replay = Callable[[], None]


async def fetch_replay(
    node: TesseractNode,
    uid: str,
    backend: FragmentBackend,
    primary: PeerAddress,
    *,
    up_to: int | None = None,
    timeout: float,
) -> Replay | None:
    """Return a function that makes a fragment follow its primary by updates, up to this version or the newest. Call it
    on the thread that uses the fragment; it raises ProtocolError for false updates. None if the state must be fetched
    whole.

    Raises: ProtocolError; what the call raises.
    """
    base = backend.fragment
    request = messages.PullRequest(uid, base.version, base.root, True)
    message = await node.call_expert(primary, messages.PULL, messages.encode(request), timeout=timeout, idempotent=True)
    reply = messages.decode(messages.UpdatesReply, message.body)
    if not reply.known:
        return None
    updates = read_updates(request.version, reply, message.buffers)
    journal = [_journal_row(row) for row in reply.journal]
    if len(journal) != len(updates):
        raise ProtocolError("updates without their journal")
    up_to = reply.version if up_to is None else up_to
    num = sum(one.version <= up_to for one in updates)
    return partial(backend.replay, updates[:num], journal[:num]) if base.version + num == up_to else None


def _journal_row(row: object) -> tuple[int, bytes, bytes]:
    if type(row) is not list or len(row) != 3 or type(row[0]) is not int or not 0 <= row[0] < 2**62:
        raise ProtocolError("a malformed journal of a fragment")
    if type(row[1]) is not bytes or len(row[1]) % 16 or type(row[2]) is not bytes or len(row[2]) > STATE_BYTES:
        raise ProtocolError("a malformed journal of a fragment")
    return row[0], row[1], row[2]


def read_updates(base: int, reply: messages.UpdatesReply, buffers: Sequence[memoryview]) -> list[Update]:
    """Return the updates of a reply to a base of that version. Untrusted. Raises: ProtocolError."""
    fits = (
        0 <= reply.steps < 2**62
        and len(reply.roots) == len(buffers) <= KEPT_UPDATES
        and base + len(buffers) == reply.version
    )
    if not fits or any(type(root) is not bytes or len(root) != ROOT_BYTES for root in reply.roots):
        raise ProtocolError("malformed updates of a fragment")
    rows = enumerate(zip(buffers, reply.roots, strict=True), base + 1)
    return [Update(version, bytes(data), root) for version, (data, root) in rows]
