"""Makes experts of a Transformers checkpoint that a `TesseractServer` can host, and describes them for a run.

A run's manifest describes an expert by the name of its class in Transformers and by the values that the class reads
from a model's configuration. It names the source of the first weights by the SHA-256 of each file that holds some.
"""

import importlib
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Final, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from tesseract_async.experts.manifest import split_uid
from tesseract_async.experts.run import Scalar
from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.server.registry import Built, expert_builder
from tesseract_async.transformers.families import is_experts, library
from tesseract_async.transformers.shards import Checkpoint
from tesseract_async.wire.tensors import DTYPE_NAMES, DTYPES, TensorSpec

MakesBackend = Callable[[str, Callable[[], Built], ExpertBackend | None], ExpertBackend]
"""Makes the backend of a uid of what a function builds, perhaps like another one (`registry.backend_of`)."""

Module = TypeVar("Module", bound=nn.Module)

_FAMILY: Final = re.compile(r"([a-z0-9_]+)\.([A-Za-z0-9_]+)")


class CheckpointExpert(nn.Module):
    """One expert: ``[rows, hidden]`` -> ``[rows, hidden]``, as its family computes it.

    Its parameters have the names of the family's own, without the dimension that counts the experts.
    """

    def __init__(
        self, family: nn.Module, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, *, trains: bool
    ) -> None:
        """`family`: the experts module of a layer, for what is not a parameter. `tensors` are kept, not copied; `dtype`
        is that of the rows, in which they are computed."""
        super().__init__()
        for name, value in vars(family).items():
            if not name.startswith("_") and isinstance(value, bool | int | float):
                setattr(self, name, value)
        if isinstance(act := getattr(family, "act_fn", None), nn.Module):
            self.act_fn = _copied(act)  # its own: one that is shared would take its mode from another expert
        kind: Any = type(family)
        self.apply_gate = kind._apply_gate  # a function of a module with the family's attributes
        self.row_dtype = dtype
        for name, x in tensors.items():
            self.register_parameter(name, nn.Parameter(x, requires_grad=trains))

    @property
    def outputs_schema(self) -> TensorSpec:
        """A row, as it comes and goes."""
        size = self.get_parameter("down_proj").shape[1 if self.is_transposed else 0]
        return TensorSpec((size,), self.row_dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.has_gate:
            hidden = self.apply_gate(self, self._project(x, "gate_up_proj"))
        else:
            hidden = self.act_fn(self._project(x, "up_proj"))
        return self._project(hidden, "down_proj")

    def _project(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = getattr(self, name), getattr(self, f"{name}_bias", None)
        if weight.dtype != x.dtype:  # it is kept and trained in more digits
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return F.linear(x, weight.t() if self.is_transposed else weight, bias)


@expert_builder
def checkpoint_expert(family: str, dtype: str = "float32", master: str = "", **config: Any) -> Built:
    """Return an expert of a run that begins from a checkpoint, with weights of zeros.

    `family`, such as ``mixtral.MixtralExperts``, reads `config`. Its rows are of `dtype`, its weights of `master`.
    """
    module, kept = family_of(family, config), DTYPES[master or dtype]
    tensors = {name: torch.zeros(x.shape[1:], dtype=kept) for name, x in module.named_parameters()}
    expert = CheckpointExpert(module, tensors, DTYPES[dtype], trains=True)
    return expert, (expert.outputs_schema,)


def family_of(name: str, config: Mapping[str, Scalar]) -> nn.Module:
    """Return the experts module of that name, without weights. Untrusted. Raises: ValueError."""
    library()
    if (found := _FAMILY.fullmatch(name)) is None:
        raise ValueError(f"not a family of experts in Transformers, such as mixtral.MixtralExperts: {name!r}")
    try:
        kind = vars(importlib.import_module(f"transformers.models.{found[1]}.modeling_{found[1]}"))[found[2]]
    except (ImportError, KeyError):
        raise ValueError(f"the Transformers that is installed here has no {name}: upgrade it") from None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module) and hasattr(kind, "_apply_gate")):
        raise ValueError(f"{name} are no experts that Transformers lets others compute")
    return _made(kind, _Config(config))


def manifest_fields(checkpoint: Checkpoint, *, dtype: str | None, master: str | None) -> dict[str, Any]:
    """Return what a run's manifest says of a checkpoint's experts, without `shards_of`; `dtype` and `master` as given.

    Raises: ValueError for a model whose layers with experts differ, or do not follow one another.
    """
    layers = checkpoint.layers
    described = [_described(layer.module) for layer in layers.values()]
    sizes = {layer.num_experts for layer in layers.values()}
    if len(sizes) > 1 or any(one != described[0] for one in described) or max(layers) - min(layers) >= len(layers):
        raise ValueError("a run takes a model whose layers with experts are all alike, and follow one another")
    numbers = {"dtype": dtype or DTYPE_NAMES[checkpoint.dtype]} | ({} if master is None else {"master": master})
    return {
        "expert": f"{__name__}:{checkpoint_expert.__name__}",
        "sizes": described[0] | numbers,
        "grid_size": (max(layers) + 1, *sizes),
        "first": min(layers),
        "genesis": "shards",
    }


def shards_of(checkpoint: Checkpoint) -> list[bytes]:
    """Return the SHA-256 of each file that holds experts. Blocking: reads all of them. Raises: OSError."""
    every = {number: range(layer.num_experts) for number, layer in checkpoint.layers.items()}
    return sorted(map(checkpoint.digest, checkpoint.tensors_of(every)))


class _Config:
    """A model's configuration, of which it remembers what was read."""

    def __init__(self, source: object) -> None:
        self._source = source
        self.read: dict[str, Scalar] = {}

    def __getattr__(self, name: str) -> Any:
        source = self._source
        try:
            value = source[name] if isinstance(source, Mapping) else getattr(source, name)
        except KeyError:
            raise AttributeError(f"its configuration has no {name}") from None
        self.read[name] = value
        return value


def _made(kind: type[nn.Module], config: object) -> nn.Module:
    with torch.device("meta"):
        module: nn.Module = kind(config)
    if not is_experts(module):
        raise ValueError(f"{kind.__name__} are no experts that Transformers lets others compute")
    return module


def _described(experts: nn.Module) -> dict[str, Scalar]:
    """Return the arguments of `checkpoint_expert` for one of these. Raises: ValueError for what no run can hold."""
    kind = type(experts)
    package, _, module = kind.__module__.rpartition(".")
    config = _Config(vars(experts)["config"])
    _made(kind, config)
    read = {name: value for name, value in config.read.items() if not name.startswith("_")}
    if not package.startswith("transformers.models.") or not all(
        value is None or isinstance(value, bool | int | float | str) for value in read.values()
    ):
        raise ValueError(f"{kind.__name__} cannot be described in a run's manifest")
    for name in [name for name, value in read.items() if value == vars(experts)["num_experts"]]:
        alone = read | {name: 1}
        if vars(_made(kind, _Config(alone)))["num_experts"] == 1:
            return {"family": f"{package.rpartition('.')[2]}.{kind.__name__}", **alone}
    raise ValueError(f"{kind.__name__} do not say how many they are")


class CheckpointExperts:
    """The experts of one checkpoint, as many of them as are asked for."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: str | None = None, master: str | None = None) -> None:
        """`dtype`: that rows travel in and are computed in; None: the checkpoint's. `master`: that the weights are kept
        and trained in; None: `dtype`."""
        self.checkpoint = checkpoint
        self._dtype = checkpoint.dtype if dtype is None else DTYPES[dtype]
        self._master = self._dtype if not master else DTYPES[master]

    def build(self, uids: Iterable[str], make: MakesBackend, *, trains: bool) -> dict[str, ExpertBackend]:
        """Read these experts, ``PREFIX.LAYER.EXPERT``, whose parameters are views of one tensor per layer and name, and
        have `make` make a backend of each.

        Blocking. Raises: ValueError for uids that are no expert of the model, or files that do not hold them, or are
        not the run's; what `make` raises.
        """
        wanted: dict[int, dict[int, str]] = {}
        for uid in uids:
            _, coords = split_uid(uid)
            if len(coords) != 2:
                raise ValueError(f"an expert of a checkpoint is PREFIX.LAYER.EXPERT, not {uid}")
            wanted.setdefault(coords[0], {})[coords[1]] = uid
        numbers = {layer: sorted(found) for layer, found in sorted(wanted.items())}
        read = self.checkpoint.read(numbers, self._master)
        made: dict[str, ExpertBackend] = {}
        first: dict[Hashable, ExpertBackend] = {}
        for layer, experts in numbers.items():
            family, tensors = self.checkpoint.layers[layer].module, read.pop(layer)
            kind = _kind_of(family), *((name, x.shape[1:]) for name, x in tensors.items())
            columns = [x.unbind() for x in tensors.values()]
            for expert, *own in zip(experts, *columns, strict=True):
                named, uid = dict(zip(tensors, own, strict=True)), wanted[layer][expert]
                like, module = first.get(kind), CheckpointExpert(family, named, self._dtype, trains=trains)
                built = module, (module.outputs_schema,) if like is None else like.args_schema
                backend = made[uid] = make(uid, lambda built=built: built, like)  # type: ignore[misc]
                first.setdefault(kind, backend)
        return made


def _copied(module: Module) -> Module:
    """Return a copy with the same parts and tensors, which shares no dictionary, such as that of hooks."""
    made = type(module).__new__(type(module))
    own = vars(module).items()
    vars(made).update({name: value.copy() if isinstance(value, dict | set) else value for name, value in own})
    return made


def _kind_of(experts: nn.Module) -> Hashable:
    """Return everything that an expert of such a module has besides its tensors: equal for experts that differ in
    numbers only."""
    act = getattr(experts, "act_fn", None)
    parts = [experts, *(act.modules() if isinstance(act, nn.Module) else ())]
    usual = vars(nn.Module())
    own = [(type(part), [(name, x) for name, x in vars(part).items() if name not in usual]) for part in parts]
    plain = bool | int | float | str
    return tuple(
        (kind, tuple((name, (type(x), x) if isinstance(x, plain) else id(x)) for name, x in attributes))
        for kind, attributes in own
    )
