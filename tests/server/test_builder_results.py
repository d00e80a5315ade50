"""A builder that returns something else than it should is told so, whoever wrote it."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from tesseract_async.server.builders import build


@pytest.mark.parametrize("result", [None, nn.Linear(4, 4), (nn.Linear(4, 4),), ("module", ()), (1, 2, 3)], ids=str)
def test_what_is_no_module_with_schemas_is_refused(result: Any) -> None:
    def mine(n: int = 4) -> Any:
        return result

    with pytest.raises(ValueError, match="my:mine returns a .*, not a module and the schemas of its arguments"):
        build(mine, {"n": 4}, name="my:mine")
