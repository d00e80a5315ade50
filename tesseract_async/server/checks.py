"""Checks of what strangers send about an expert, against its schema and its codecs."""

from collections.abc import Sequence

import torch

from tesseract_async.errors import SchemaMismatch, shortened, text_of
from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.gradients import Gradients
from tesseract_async.wire import tensors as wire
from tesseract_async.wire.codecs import CODECS


def versions_of(inputs: Sequence[torch.Tensor | None]) -> list[int]:
    """Return the tensors' in-place versions."""
    versions = []
    for x in inputs:  # no comprehension: another call of a function, before Python 3.12
        if x is not None:
            versions.append(x._version)
    return versions


def num_rows_of(inputs: Sequence[torch.Tensor | None]) -> int:
    """Return how many rows there are."""
    assert inputs[0] is not None
    return inputs[0].shape[0]


def specs_of_backward(backend: ExpertBackend, metas: Sequence[wire.Meta], num_inputs: int) -> list[wire.TensorSpec]:
    """Return the specs of a backward's tensors: inputs, if they come, and output gradients."""
    size = None
    if backend.varies:
        size = wire.meta_size([*(backend.input_specs if num_inputs else ()), *backend.output_specs], metas)
    of_inputs, of_outputs = backend.specs(size)
    return [*(of_inputs if num_inputs else ()), *of_outputs]


def check_inputs(
    uid: str, backend: ExpertBackend, tensors: Sequence[torch.Tensor | None]
) -> tuple[Sequence[torch.Tensor | None], Sequence[wire.TensorSpec]]:
    """Return the inputs of an untrusted call, and the specs of its outputs.

    Raises: SchemaMismatch, with both schemas in the sentence.
    """
    size = None
    if backend.varies:
        size = wire.size_of(backend.input_specs, [None if x is None else x.shape for x in tensors])
    specs, output_specs = backend.specs(size)
    first = tensors[0] if tensors else None
    num_rows = first.shape[0] if first is not None and first.dim() else -1  # a 0-d tensor has no rows, and fits none
    if _all_fit(tensors, specs, num_rows):
        return tensors, output_specs
    raise _mismatch(uid, backend.inputs_schema, tensors)


def check_gradients(
    uid: str,
    backend: ExpertBackend,
    inputs: Sequence[torch.Tensor | None],
    specs: Sequence[wire.TensorSpec],
    tensors: Sequence[torch.Tensor | None],
) -> Gradients:
    """Return the output gradients of an untrusted call: each absent, or like the output. Raises: SchemaMismatch."""
    num_rows = num_rows_of(inputs)
    if not _all_fit(tensors, specs, num_rows, may_lack=True):
        raise _mismatch(f"backward of {uid}, for {num_rows} rows,", backend.outputs_schema, tensors)
    return tensors


def _all_fit(
    tensors: Sequence[torch.Tensor | None], specs: Sequence[wire.TensorSpec], num_rows: int, *, may_lack: bool = False
) -> bool:
    """Return whether each has this many rows of its spec. Optional ones may be absent; all, if they `may_lack`."""
    if len(tensors) != len(specs):
        return False
    for x, spec in zip(tensors, specs, strict=True):
        if x is None:
            if not (may_lack or spec.optional):
                return False
        elif x.dtype != spec.dtype or x.shape != (num_rows, *spec.shape):
            return False
    return True


def _mismatch(what: str, schema: wire.Schema, tensors: Sequence[torch.Tensor | None]) -> SchemaMismatch:
    takes, got = wire.describe_schema(schema), wire.describe_structure(tuple(tensors))
    return SchemaMismatch(f"{what} takes {takes}; got {got}")


def check_codecs(
    uid: str, backend: ExpertBackend, what: str, metas: Sequence[wire.Meta], tensors: Sequence[torch.Tensor | None]
) -> None:
    """Check that these tensors may come in these codecs. Raises: SchemaMismatch."""
    policy = backend.settings.codecs
    if len(getattr(policy, what)) == len(CODECS):
        return
    for meta, tensor in zip(metas, tensors, strict=True):
        if meta is not None and tensor is not None and tensor.is_floating_point():
            policy.check(what, meta[2], expert=uid)


def check_growth(what: str, metas: Sequence[wire.Meta], schema: wire.Schema, specs: Sequence[wire.TensorSpec]) -> None:
    """Refuse tensors that would take more memory, unpacked, than fitting ones. Raises: SchemaMismatch."""
    if not wire.may_unpack(metas, specs):
        got = shortened(text_of(lambda: str(metas)))  # they may be nested too deeply for `str`
        raise SchemaMismatch(f"{what} takes {wire.describe_schema(schema)}; got {got}")
