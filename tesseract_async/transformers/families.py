"""The models of Transformers whose experts can live elsewhere, and the place of those experts in the model.

A family takes part if its experts modules are dispatched through Transformers' registry of experts functions, which
keep the weights of a layer's experts in a few tensors whose first dimension counts the experts. Which families these
are, Transformers knows: this module lists only those that people will ask for in vain.
"""

import re
from typing import Any, Final

from torch import nn

LEAST_VERSION: Final = (5, 12)
WITHOUT_HOOK: Final = {
    "llama4": "Llama 4",
    "llama4_text": "Llama 4",
    "dbrx": "DBRX",
    "switch_transformers": "Switch Transformers",
    "nllb-moe": "NLLB-MoE",
}
"""Mixtures of experts that compute their experts themselves, not through that registry."""
_PARAMETERS: Final = re.compile(r"(gate_up|up|down)_proj(_bias)?")


def library() -> Any:
    """Return Transformers. Raises: ValueError if it is absent or too old."""
    try:
        import transformers
    except ImportError:
        raise ValueError("this needs more packages: pip install -e '.[transformers]' in the clone") from None
    found = re.match(r"(\d+)\.(\d+)", transformers.__version__)
    if found is None or (int(found[1]), int(found[2])) < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise ValueError(f"this needs Transformers {least} or later, and {transformers.__version__} is installed here")
    return transformers


def is_experts(module: nn.Module) -> bool:
    """Return whether Transformers dispatches this module's forward through its registry of experts functions."""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_concatenated") and hasattr(module, "num_experts")


def experts_of(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """Return the experts modules of a model: layer number -> path and module.

    Raises: ValueError for a model without them, or whose experts are made of other parts than are known here.
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    for path, module in model.named_modules():
        if not is_experts(module):
            continue
        number = re.search(r"\.(\d+)\.", f".{path}.")
        unknown = [name for name, _ in module.named_parameters() if not _PARAMETERS.fullmatch(name)]
        if number is None or int(number[1]) in found or unknown or getattr(module, "has_post_expert_norm", False):
            what = ", ".join(unknown) or path
            raise ValueError(f"the experts of {_kind(model)} are not of a kind that can live elsewhere: {what}")
        found[int(number[1])] = path, module
    if not found:
        check_config(getattr(model, "config", None))
        raise ValueError(f"{_kind(model)} has no experts")
    return found


def check_config(config: Any) -> None:
    """Raises: ValueError for a family of `WITHOUT_HOOK`, and for weights that are kept in a quantized form."""
    if (name := WITHOUT_HOOK.get(getattr(config, "model_type", ""))) is not None:
        raise ValueError(
            f"{name} computes its experts itself, not through Transformers' registry: they cannot live elsewhere"
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        given = quantization if isinstance(quantization, dict) else vars(quantization)
        method = str(getattr(given.get("quant_method"), "value", given.get("quant_method", "a quantized form")))
        raise ValueError(
            f"this checkpoint keeps its weights in {method}: load it once with a quantization_config that says "
            "dequantize=True, save it in bfloat16, and take that folder"
        )


def _kind(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
