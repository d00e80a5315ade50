"""Mixture-of-experts checkpoints of Hugging Face Transformers whose experts live on volunteers' computers.

Needs the extra ``[transformers]``. Nothing here imports Transformers before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tesseract_async.transformers.export import export_checkpoint as export_checkpoint
    from tesseract_async.transformers.remote import remote_experts as remote_experts
    from tesseract_async.transformers.remote import save_point as save_point

_HOMES = {"export_checkpoint": "export", "remote_experts": "remote", "save_point": "remote"}

__all__ = ["export_checkpoint", "remote_experts", "save_point"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
