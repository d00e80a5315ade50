"""Models of Transformers whose experts are elsewhere: `remote_experts`.

The model's router stays; the experts' modules stay, without parameters, and are dispatched through Transformers'
registry of experts functions, where this is ``"tesseract"``. No class is changed.
"""

import contextlib
from collections.abc import Iterator
from typing import Final

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from tesseract_async.client.background import BackgroundNode
from tesseract_async.client.expert_pool import ExpertPool
from tesseract_async.client.settings import DEFAULT_OPTIONS, CallOptions
from tesseract_async.transformers import operator
from tesseract_async.transformers.families import WITHOUT_HOOK, check_config, is_experts, library
from tesseract_async.transformers.lockstep import LockstepTrainer, StandIn

IMPLEMENTATION: Final = "tesseract"
_IGNORED: Final = {
    "_keys_to_ignore_on_load_unexpected": {r"(^|\.)experts\."},
    "_keys_to_ignore_on_load_missing": {r"\.experts\.remote\."},
}
"""Names that the loader is not to warn of: the experts' weights in the files, and the stand-ins that are in none."""
_NOT_INSIDE: Final = (
    "this model's experts are to be remote, and it was made outside of `with ta.transformers.remote_experts(node, "
    "prefix):`, so nothing says where they are: make it inside"
)


def experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The function that Transformers calls in place of an experts module's forward."""
    layer = getattr(module, "tesseract_layer", None)
    if layer is None:
        raise RuntimeError(_NOT_INSIDE)
    stand_in: StandIn = module.tesseract_first.remote  # type: ignore[union-attr, assignment]
    if not torch.compiler.is_compiling():
        layer.lockstep.belongs_to(stand_in)
        if not torch.is_grad_enabled() and len(hidden_states):  # no graph, no operator
            layer.set_training(module.training)
            found: torch.Tensor = layer.pool.answer(hidden_states, top_k_index, top_k_weights)
            return found
    answer: tuple[torch.Tensor, torch.Tensor] = operator.experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        stand_in.anchor,
        layer.number,
        module.training,
        torch.is_grad_enabled(),
        torch.compiler.is_compiling(),
    )
    return answer[0]


@contextlib.contextmanager
def remote_experts(
    node: BackgroundNode, prefix: str, *, options: CallOptions = DEFAULT_OPTIONS, timeout: float = 30.0
) -> Iterator[None]:
    """Models that are made inside have the experts ``prefix.LAYER.EXPERT`` of the swarm in place of local ones.

    ::

        with ta.BackgroundNode(initial_peers=[...]) as node, ta.transformers.remote_experts(node, "qwen3"):
            model = AutoModelForCausalLM.from_pretrained(folder)

    Any way of making or loading a model will do. The experts' weights are neither read nor allocated. The model can be
    used as long as the node runs, also after the block. `options` and `timeout` (seconds): as for `ExpertPool`.

    Raises: ValueError if Transformers is absent or too old; inside, for a quantized model, and for a family that
    computes its experts itself; at the end, if no model with experts was made inside.
    """
    library()
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if not isinstance(node, BackgroundNode):
        raise TypeError(
            f"remote_experts takes a BackgroundNode, because models do not await; not a {type(node).__name__}"
        )
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    unplaced: list[nn.Module] = []
    num_layers = 0

    def registered(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal num_layers
        if child is None:
            return
        if getattr(getattr(child, "config", None), "model_type", None) in WITHOUT_HOOK:
            check_config(child.config)  # says so
        if is_experts(child) and not vars(child).get("tesseract_layer"):
            _strip(child)
            unplaced.append(child)
        if not unplaced or not isinstance(parent, nn.ModuleList):
            return
        within = set(child.modules())
        for experts in [one for one in unplaced if one in within]:
            unplaced.remove(experts)
            num_layers += 1
            num_experts: int = vars(experts)["num_experts"]
            pool = ExpertPool(node, f"{prefix}.{name}", num_experts=num_experts, options=options, timeout=timeout)
            _place(experts, parent, node, pool, LockstepTrainer(node, prefix, timeout=timeout))

    handle = register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()
    if unplaced or not num_layers:
        raise ValueError("no model whose layers have experts was made inside `remote_experts`")


def remote_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the model whose experts are remote, by path. Raises: ValueError if there are none."""
    found = {path: module for path, module in model.named_modules() if "tesseract_layer" in vars(module)}
    if not found:
        raise ValueError("this model has no remote experts: it was not made inside `remote_experts`")
    return found


def lockstep_of(model: nn.Module) -> LockstepTrainer:
    """Return the object that speaks for this model to the servers. Raises: as `remote_layers`."""
    one = vars(next(iter(remote_layers(model).values())))
    layer: operator.RemoteLayer = one["tesseract_layer"]
    layer.lockstep.belongs_to(one["tesseract_first"].remote)
    return layer.lockstep


def is_stand_in(name: str) -> bool:
    """Return whether this entry of a model's state stands for what is remote."""
    return name.endswith((".experts.remote.anchor", ".experts.remote.round"))


def _strip(experts: nn.Module) -> None:
    """Take the parameters away; the loader then has no use for their tensors, and does not read them."""
    config = vars(experts)["config"]
    check_config(config)
    config._experts_implementation = IMPLEMENTATION
    # saved with the model, it makes plain Transformers refuse a folder in which the experts are not
    config.experts_implementation = IMPLEMENTATION
    shapes = {name: (parameter.shape, parameter.dtype) for name, parameter in experts.named_parameters()}
    experts._parameters.clear()
    vars(experts).update(tesseract_shapes=shapes, _is_hf_initialized=True)


def _place(
    experts: nn.Module, layers: nn.ModuleList, node: BackgroundNode, pool: ExpertPool, lockstep: LockstepTrainer
) -> None:
    """Mark the modules in `layers` as remote, and note which of them has the model's stand-in; `lockstep` is for the
    first of them."""
    first = next((one for one in layers.modules() if isinstance(getattr(one, "remote", None), StandIn)), None)
    if first is None:
        first = experts
        first.remote = StandIn()
        lockstep.belongs_to(first.remote)
        vars(layers).update(_IGNORED)
        node.begin(pool.watch())  # which takes a while, as does loading the rest of the model
    else:
        lockstep = vars(first)["tesseract_layer"].lockstep
        if vars(first)["tesseract_shapes"] == vars(experts)["tesseract_shapes"]:
            pool.take_for_like(vars(first)["tesseract_layer"].pool)
    lockstep.add(pool, has_biases=any(name.endswith("_bias") for name in vars(experts)["tesseract_shapes"]))
    # in the module's dictionary alone: neither is a submodule
    vars(experts).update(tesseract_first=first, tesseract_layer=operator.RemoteLayer(node, pool, lockstep))


def save_point(model: nn.Module) -> int:
    """Have the servers of a model in lockstep write checkpoints of this very step; return its number.

    Save the model at the same step, as with ``model.save_pretrained``: that number is part of it, and training goes on
    only with servers that have it too. Raises: ValueError if the experts are not in lockstep, or of another step.
    """
    return lockstep_of(model).save()
