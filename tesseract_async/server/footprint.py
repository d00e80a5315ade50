"""The memory that an expert takes, measured, and how a volunteer's limit is divided."""

import copy
import dataclasses
import gc
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import psutil
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tesseract_async.runtime import lockstep
from tesseract_async.runtime.backend import BackendSettings, ExpertBackend
from tesseract_async.runtime.gradients import Gradients
from tesseract_async.runtime.states import JOURNAL_LENGTH
from tesseract_async.server.memory import trim_heap

logger = logging.getLogger(__name__)

JOURNALED_BYTES: Final = 256
"""Bytes of a journal's entry: Python takes 170 to 250 for a call id and a version, the most when the table has just
grown."""
COPIED_JOURNALED_BYTES: Final = 24
NUM_PROBE_ROWS: Final = 4
PROBE_MARGIN: Final = 2.0
"""A module that does not run on ``meta`` is assumed to need this many times the memory of each probed row: with few
rows, the peak is where the parameters' gradients meet, not where all activations do."""

MAX_OPERATIONS: Final = 20_000
"""The most operations on tensors that building an expert with somebody else's sizes may take."""

KERNEL_MARGIN: Final = 1.1
"""The factor that covers memory that kernels take without making a tensor."""


@dataclass(frozen=True, slots=True)
class Footprint:
    weights: int
    """Bytes of parameters and buffers."""
    gradients: int
    """Bytes of a gradient for each parameter that is trained."""
    optimizer: int
    """Bytes of the optimizer's state after the first step."""
    batch: int
    """The most bytes that a forward and backward of `max_batch_size` rows needs at once, gradients and staged rows
    included; only one expert of a device computes at a time."""
    num_sums: int = 0
    """The most sums of gradients that wait for a step: one over all batches, or one for each peer."""
    journal_length: int = JOURNAL_LENGTH
    goes_back: bool = True
    """True if a failed step goes back to a state that is kept for that. In lockstep, none is kept."""

    @property
    def state(self) -> int:
        journal = COPIED_JOURNALED_BYTES * self.journal_length if self.gradients else 0
        return self.weights + self.optimizer + journal + self.gradients * min(self.num_sums, 1)

    @property
    def resident(self) -> int:
        """Bytes held as long as the expert is hosted: itself, its journal, and the state that a failed step goes back
        to. A frozen one has no more than its weights."""
        if not self.gradients:
            return self.weights
        held = self.weights + self.optimizer + self.journal + self.gradients * self.num_sums
        return held + (self.state if self.goes_back else 0)

    @property
    def journal(self) -> int:
        """Bytes of a full journal."""
        return JOURNALED_BYTES * self.journal_length if self.gradients else 0


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    num_experts: int
    """The number of experts that fit; 0 if not even one does."""
    needed_for_one: int
    """The least limit with which one expert fits."""
    budgets: Mapping[str, int]
    """Bytes that the server may keep for others, by the names of `SHARES`."""


SHARES: Final[Mapping[str, tuple[float, int]]] = {
    "queue": (1 / 8, 1 << 30),  # rows that wait for the device
    "inputs": (1 / 16, 256 << 20),  # kept for backwards
    "answers": (1 / 64, 64 << 20),  # kept for callers that ask again
    "received": (1 / 10, 3 << 29),  # messages that are half received or being answered
    "replies": (1 / 20, 3 << 28),  # that wait to be taken
    "calls": (1 / 40, 3 << 27),  # small ones under way
    "copies": (1 / 16, 1 << 30),  # of states that are being sent to followers
}
"""Shares of the memory that a limit leaves besides the process itself, and the most bytes that are ever needed."""


def plan_memory(limit: int, *, base: int, expert: Footprint, on_gpu: bool = False) -> MemoryPlan:
    """Divide `limit` where the process holds `base` before its first expert.

    `on_gpu`: experts live elsewhere, and only copies of their states here.
    """
    room = max(0, limit - base)
    budgets = {name: min(int(share * room), most) for name, (share, most) in SHARES.items()}
    # a checkpoint is copied while the copy before it is still held, and a state is sent as one piece of memory
    once = expert.batch + expert.state + expert.state
    resident = expert.state + expert.journal if on_gpu else expert.resident
    left = room - sum(budgets.values()) - once
    share = sum(share for share, _ in SHARES.values())
    needed = base + math.ceil((once + resident) / (1 - share)) + 1
    return MemoryPlan(max(0, left) // max(1, resident), needed, budgets)


def measure(backend: ExpertBackend) -> Footprint:
    """Measure an expert by taking a step: for a backend that is not used afterwards. Raises what its module raises.

    The largest batch runs on PyTorch's ``meta`` device, which takes no memory, while all tensors made are counted. Of a
    spread expert, what each process has is measured.
    """
    settings, rebuild, num = backend.settings, backend.rebuild, backend.num_processes
    few = peak_of(backend, NUM_PROBE_ROWS, backend.device) if rebuild is None else 0
    found = backend.gradients(*probe(backend, 1, backend.device), training=True)
    for _ in range(settings.step_every):
        backend.step(found[1])
    if settings.lockstep:
        lockstep.step({backend.name: backend}, backend.version, "", {})
    state = {} if backend.optimizer is None else backend.optimizer.state_dict()["state"]
    with torch.device("meta"):
        whole = backend.module if rebuild is None else rebuild()
    gradients = _num_bytes(backend.parameters)
    try:
        on_meta = _on_meta(backend, None if rebuild is None else whole)
        batch = peak_of(on_meta, backend.max_batch_size, torch.device("meta"))
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        # it looks at the numbers themselves, or uses what ``meta`` does not have
        logger.info("%s does not run on meta (%s): its memory is estimated", type(whole).__name__, error)
        if rebuild is None:
            more = peak_of(backend, 2 * NUM_PROBE_ROWS, backend.device)
            row = PROBE_MARGIN * max(0, more - few) / NUM_PROBE_ROWS
            batch = more + int(row * max(0, backend.max_batch_size - 2 * NUM_PROBE_ROWS))
        else:
            batch = 2 * gradients
    if rebuild is not None:  # its share, and two parts that are gathered at once, each with its gradient
        part = max([_num_bytes(one.parameters()) for one in _parts_of(whole)], default=0)
        batch = max(0, batch - gradients) // num + gradients // num + 4 * part
    return Footprint(
        weights=-(-_num_bytes((*whole.parameters(), *whole.buffers())) // num),
        gradients=-(-gradients // num),
        optimizer=-(-_num_bytes(tree_leaves(state)) // num),
        batch=int(KERNEL_MARGIN * batch),
        num_sums=4 * settings.step_every if settings.trim_peers else int(settings.step_every > 1 or settings.lockstep),
        journal_length=backend.journal_length,
        goes_back=not settings.lockstep,
    )


def _parts_of(module: nn.Module) -> list[nn.Module]:
    """Return the parts of a module that FSDP gathers one by one, or itself if it has none."""
    lists = [one for one in module.modules() if isinstance(one, nn.Sequential | nn.ModuleList)]
    inner = [child for one in lists for child in one if not any(below in lists for below in child.modules())]
    return inner or [module]


def template_of(backend: ExpertBackend) -> ExpertBackend:
    """Return an expert without its weights, of which shapes and sizes count: this one, or like one that is spread."""
    if backend.rebuild is None:
        backend.module.to("meta")
        return backend
    with torch.device("meta"):
        return _on_meta(backend, backend.rebuild())


def _on_meta(backend: ExpertBackend, module: nn.Module | None = None) -> ExpertBackend:
    module = copy.deepcopy(backend.module).to("meta") if module is None else module
    parameters = [one for one in module.parameters() if one.requires_grad] if backend.parameters else []
    return ExpertBackend(
        module,
        optimizer=(lambda: torch.optim.SGD(parameters, lr=0.0)) if parameters else None,
        args_schema=backend.args_schema,
        kwargs_schema=backend.kwargs_schema,
        outputs_schema=backend.outputs_schema,
        max_batch_size=backend.max_batch_size,
        settings=BackendSettings(allow_batch_statistics=True, autocast=backend.settings.autocast),
    )


def probe(backend: ExpertBackend, num_rows: int, device: torch.device) -> tuple[list[torch.Tensor], Gradients]:
    """Return inputs of zeros for this many rows, and gradients of their outputs. Sizes that vary are as large as they
    may be."""
    size = max((spec.max_size for spec in backend.input_specs if spec.varies), default=None)
    inputs, gradients = (
        [torch.zeros(num_rows, *spec.least_shape, dtype=spec.dtype, device=device) for spec in specs]
        for specs in backend.specs(size)
    )
    return inputs, [x if x.is_floating_point() or x.is_complex() else None for x in gradients]


def peak_of(backend: ExpertBackend, num_rows: int, device: torch.device) -> int:
    """Return the bytes of all tensors, staged rows and answers included, at the worst moment of both passes."""
    backend.prepare()
    with Counting() as counting:
        inputs, gradients = probe(backend, num_rows, device)
        backend.forward(inputs, training=True)
        # gathering copies the rows of many requests
        staged = [x.clone() for x in inputs]
        backend.gradients(staged, gradients, training=True)
    return int(counting.peak)


def process_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def fit_memory(limit: int, build: Callable[[], ExpertBackend], *, devices: Sequence[str]) -> MemoryPlan:
    """Divide the memory `limit` of this process among experts like the one that `build` makes, and their callers.

    One is built, measured and thrown away. Blocking. Raises: ValueError with the figures if not even one fits.
    """
    if process_bytes() >= limit:
        raise ValueError(f"not even one expert fits --max-memory: the process itself has {size_text(process_bytes())}")
    expert = measure(build())
    expert = dataclasses.replace(expert, batch=expert.batch * len(devices))  # they compute at the same time
    gc.collect()
    trim_heap()
    base = process_bytes()  # with everything in it that the first expert made PyTorch import
    plan = plan_memory(limit, base=base, expert=expert, on_gpu=not any(one.startswith("cpu") for one in devices))
    logger.info("memory: the process has %d bytes; %s; %s", base, expert, plan)
    if not plan.num_experts:
        raise ValueError(
            f"not even one expert fits --max-memory: the process itself has {size_text(base)}, an expert takes "
            f"{size_text(expert.resident)}, its largest batch {size_text(expert.batch)} while it is computed; with "
            f"what must be kept for callers, one needs {size_text(plan.needed_for_one)}"
        )
    return plan


def size_text(num_bytes: int) -> str:
    """``800 MiB``, ``14,901.2 GiB``."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


class OutOfBudget(Exception):
    """More than `Counting` allows; says what."""


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of all tensors that are made in this thread, and are still alive.

    With a `limit`, a tensor beyond it is not made: raises OutOfBudget; so does work without an end.
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit = limit
        self.num_bytes = 0
        self.peak = 0
        self._num_operations = 0
        self._known: set[int] = set()

    def add(self, num_bytes: int) -> None:
        """Count what is yet to be made. Raises: OutOfBudget."""
        self.num_bytes += num_bytes
        self.peak = max(self.peak, self.num_bytes)
        if self.limit is not None and self.num_bytes > self.limit:
            raise OutOfBudget(size_text(self.num_bytes))

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        if self.limit is not None:
            self._num_operations += 1
            if self._num_operations > MAX_OPERATIONS:
                raise OutOfBudget(f"{MAX_OPERATIONS:,} operations on tensors")
            if "device" in kwargs and not any(isinstance(one, torch.Tensor) for one in tree_leaves((args, kwargs))):
                planned = _num_bytes(tree_leaves(func(*args, **kwargs | {"device": "meta", "pin_memory": None})))
                self.add(planned)
                self.num_bytes -= planned
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._known:
            return
        num_bytes = storage.nbytes()
        self._known.add(key)

        def gone() -> None:
            self._known.discard(key)
            self.num_bytes -= num_bytes

        weakref.finalize(storage, gone)
        self.add(num_bytes)


def _num_bytes(values: Iterable[object]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
