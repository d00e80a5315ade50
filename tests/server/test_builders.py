"""A builder that returns something else than it should is told so, whoever wrote it."""

from __future__ import annotations

import pytest
from torch import nn

import tesseract_async as ta
from tesseract_async.server.builders import build_module

RESULTS = [None, nn.Linear(4, 4), (nn.Linear(4, 4),), ("module", ()), (1, 2, 3)]


@ta.expert_builder
def returns(number: int = 0) -> object:  # type: ignore[arg-type]
    return RESULTS[number]


@pytest.mark.parametrize("number", range(len(RESULTS)))
def test_what_is_no_module_with_schemas_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=":returns returns a .*, not a module and the schemas of its arguments"):
        build_module(f"{__name__}:returns", {"number": number}, marked=True)
