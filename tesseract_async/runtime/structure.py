"""Descriptions of modules as plain values: enough to rebuild them without their constructors, or code in a file.

A description names classes and functions by import path, and only those of `ALLOWED` modules, and of modules that the
reader allows, are ever imported. A part that cannot be described raises an error that says so when the module is
rebuilt.
"""

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn

from tesseract_async.errors import CheckpointError, describe
from tesseract_async.wire.tensors import DTYPE_NAMES, DTYPES

Described = dict[str, Any]
"""A module as JSON describes it."""
ParameterOf = Callable[[str, bool], nn.Parameter]
"""Gives the parameter of this name, and says if it is trained."""

ALLOWED: Final = ("torch.nn", "torch._C._nn", "tesseract_async.server.registry")
"""Modules, with those inside of them, whose classes and functions may always be imported."""
_PLAIN: Final = (bool, int, float, str, type(None))
_OF_ALL: Final = frozenset(vars(nn.Module()))
_HOOKS: Final = tuple(name for name in _OF_ALL if name.endswith("_hooks"))


class _Indescribable(Exception):
    pass


def describe_module(
    module: nn.Module, *, replace: Callable[[str, nn.Module], Described | None] = lambda path, part: None
) -> Described:
    """Return the description of a module: its class, plain attributes and the names of its tensors, and its parts'.

    `replace` gives, by path and module, what stands for a part instead. What cannot be described is named in the
    description, by `rebuild_module`'s error.
    """
    tensors = {id(one): name for name, one in (*module.named_parameters(), *module.named_buffers())}
    try:
        return _describe(module, "", tensors, {}, replace)
    except _Indescribable as error:
        return {"cannot": str(error)}


def _describe(
    module: nn.Module,
    path: str,
    tensors: dict[int, str],
    modules: dict[int, str],
    replace: Callable[[str, nn.Module], Described | None],
) -> Described:
    if id(module) in modules:
        return {"same": modules[id(module)]}
    modules[id(module)] = path
    if (instead := replace(path, module)) is not None:
        return instead
    if any(getattr(module, name) for name in _HOOKS):
        raise _Indescribable(f"{path or 'the module'} has hooks")
    values = {
        name: _value(value, f"{path}.{name}".lstrip(".")) for name, value in vars(module).items() if name not in _OF_ALL
    }

    def key(tensor: torch.Tensor, name: str) -> str:
        if tensor.layout is not torch.strided or tensor.dtype not in DTYPE_NAMES:
            raise _Indescribable(f"{path}.{name} is {tensor.dtype}, {tensor.layout}")
        return tensors[id(tensor)]

    return {
        "class": _path_of(type(module), path),
        "values": values,
        "parameters": {
            name: None if one is None else [key(one, name), one.requires_grad]
            for name, one in module._parameters.items()
        },
        "buffers": {
            name: None if one is None else [key(one, name), name not in module._non_persistent_buffers_set]
            for name, one in module._buffers.items()
        },
        "modules": {
            name: None if part is None else _describe(part, f"{path}.{name}".lstrip("."), tensors, modules, replace)
            for name, part in module._modules.items()
        },
    }


def _path_of(what: Any, path: str) -> str:
    name, module = getattr(what, "__qualname__", ""), getattr(what, "__module__", None)
    try:
        if _find(module or "", name) is what:
            return f"{module}:{name}"
    except (ImportError, AttributeError, ValueError):
        pass
    raise _Indescribable(f"{path or 'the module'} is {name or what!r}, which cannot be imported by name")


def _find(module: str, path: str) -> object:
    """The class or function of that name, if it is the module's own: not what the module imports from elsewhere."""
    where: object = importlib.import_module(module)
    for name in path.split("."):
        where = getattr(where, name)
        if getattr(where, "__module__", None) != module:
            raise AttributeError(f"{path} is not of {module}")
    return where


def _value(value: object, path: str) -> Any:
    if isinstance(value, _PLAIN) and type(value) in _PLAIN:
        return value
    if isinstance(value, torch.dtype) and value in DTYPE_NAMES:
        return {"dtype": DTYPE_NAMES[value]}
    if isinstance(value, torch.Size):
        return {"size": list(value)}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_value(item, path) for item in value]}  # type: ignore[attr-defined]
    if type(value) is dict:
        return {"dict": [[_value(key, path), _value(item, path)] for key, item in value.items()]}
    if callable(value) and not isinstance(value, nn.Module | type):
        return {"function": _path_of(value, path)}
    raise _Indescribable(f"its {path} is a {type(value).__name__}")


def rebuild_module(
    described: Described,
    tensors: Mapping[str, torch.Tensor],
    *,
    allowed_modules: Collection[str] = (),
    replaced: Callable[[str, Described, ParameterOf], nn.Module | None] = lambda path, instead, parameter: None,
) -> nn.Module:
    """Return the module of a description, with these tensors. Untrusted, but for modules that are allowed.

    `replaced` gives what stands for a part where `describe_module`'s `replace` gave something; its third argument
    gives the parameters by name, tied ones once.

    Raises: CheckpointError for what is no description, names what is not allowed, or lacks a tensor.
    """
    builder = _Builder(tensors, (*ALLOWED, *allowed_modules), replaced)
    try:
        return builder.build(described, "")
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"it cannot be built: {describe(error)}") from error


class _Builder:
    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        allowed: Sequence[str],
        replaced: Callable[[str, Described, ParameterOf], nn.Module | None],
    ) -> None:
        self._tensors, self._allowed, self._replaced = tensors, allowed, replaced
        self._parameters: dict[str, nn.Parameter] = {}
        self._modules: dict[str, nn.Module] = {}

    def build(self, described: Described, path: str) -> nn.Module:
        if "same" in described:
            return self._modules[described["same"]]
        if "cannot" in described:
            raise CheckpointError(f"how it is built could not be written down: {str(described['cannot'])[:200]}")
        module = self._replaced(path, described, self._parameter)
        if module is None:
            module = self._build(described, path)
        self._modules[path] = module
        return module

    def _build(self, described: Described, path: str) -> nn.Module:
        kind = self._import(described["class"])
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise CheckpointError(f"{described['class']} is no class of modules")
        module: nn.Module = kind.__new__(kind)
        nn.Module.__init__(module)
        for name, value in described["values"].items():
            if name in _OF_ALL:
                raise CheckpointError(f"{path} sets {name}")
            vars(module)[name] = self._value(value)
        for name, one in described["parameters"].items():
            module.register_parameter(name, None if one is None else self._parameter(*one))
        for name, one in described["buffers"].items():
            module.register_buffer(
                name, None if one is None else self._tensors[one[0]], persistent=one is None or one[1]
            )
        for name, part in described["modules"].items():
            module.register_module(name, None if part is None else self.build(part, f"{path}.{name}".lstrip(".")))
        return module

    def _parameter(self, key: str, requires_grad: bool) -> nn.Parameter:
        if key not in self._parameters:
            self._parameters[key] = nn.Parameter(self._tensors[key], requires_grad=bool(requires_grad))
        return self._parameters[key]

    def _import(self, path: str) -> object:
        module, _, name = path.partition(":")
        if not any(module == one or module.startswith(f"{one}.") for one in self._allowed):
            raise CheckpointError(
                f"it is built from {path}: if you know that code and have it installed, allow it with "
                f"allowed_modules=[{module!r}], or give the module to load into"
            )
        try:
            return _find(module, name)
        except (ImportError, AttributeError) as error:
            raise CheckpointError(f"there is no {path} here: {describe(error)}") from error

    def _value(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "dtype":
            return DTYPES[content]
        if kind == "function":
            return self._import(content)
        if kind == "dict":
            return {self._value(key): self._value(item) for key, item in content}
        items = [self._value(item) for item in content]
        return {"tuple": tuple, "list": list, "size": torch.Size}[kind](items)
