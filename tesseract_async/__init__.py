"""Train one large mixture-of-experts model on computers that volunteers lend, from any asyncio program.

The names below are the whole public interface. They load on first use, so that importing this package costs
nothing, and a node that only routes (a bootstrap node) never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tesseract_async.admission import Policy as Policy
    from tesseract_async.admission import Quota as Quota
    from tesseract_async.client.autograd import backward as backward
    from tesseract_async.client.background import BackgroundNode as BackgroundNode
    from tesseract_async.client.expert_pool import ExpertPool as ExpertPool
    from tesseract_async.client.gating_function import GatingFunction as GatingFunction
    from tesseract_async.client.gating_function import SwitchGatingFunction as SwitchGatingFunction
    from tesseract_async.client.isolated import isolated as isolated
    from tesseract_async.client.local_mixture import LocalMixture as LocalMixture
    from tesseract_async.client.remote_expert import RemoteExpert as RemoteExpert
    from tesseract_async.client.settings import CallOptions as CallOptions
    from tesseract_async.client.settings import MixtureSettings as MixtureSettings
    from tesseract_async.client.tensorboard import TensorBoard as TensorBoard
    from tesseract_async.client.trainer import AsyncTrainer as AsyncTrainer
    from tesseract_async.identity import Identity as Identity
    from tesseract_async.identity import PeerID as PeerID
    from tesseract_async.leaving import run as run
    from tesseract_async.network.network import TesseractNetwork as TesseractNetwork
    from tesseract_async.node import TesseractNode as TesseractNode
    from tesseract_async.runtime.backend import ExpertBackend as ExpertBackend
    from tesseract_async.runtime.mesh import MeshBackend as MeshBackend
    from tesseract_async.runtime.runtime import TesseractRuntime as TesseractRuntime
    from tesseract_async.saving.model import load_model as load_model
    from tesseract_async.saving.model import restore_model as restore_model
    from tesseract_async.saving.model import save_model as save_model
    from tesseract_async.server.registry import expert_builder as expert_builder
    from tesseract_async.server.server import TesseractServer as TesseractServer
    from tesseract_async.shared_parameters import SharedParameters as SharedParameters
    from tesseract_async.shared_sampler import SharedSampler as SharedSampler
    from tesseract_async.wire.tensors import TensorSpec as TensorSpec

__version__ = "0.2.0"

_HOMES = {
    "backward": "client.autograd",
    "isolated": "client.isolated",
    "AsyncTrainer": "client.trainer",
    "TensorBoard": "client.tensorboard",
    "BackgroundNode": "client.background",
    "CallOptions": "client.settings",
    "ExpertPool": "client.expert_pool",
    "GatingFunction": "client.gating_function",
    "MixtureSettings": "client.settings",
    "SwitchGatingFunction": "client.gating_function",
    "RemoteExpert": "client.remote_expert",
    "Identity": "identity",
    "PeerID": "identity",
    "expert_builder": "server.registry",
    "run": "leaving",
    "Policy": "admission",
    "Quota": "admission",
    "TesseractNetwork": "network.network",
    "TesseractNode": "node",
    "ExpertBackend": "runtime.backend",
    "MeshBackend": "runtime.mesh",
    "TesseractRuntime": "runtime.runtime",
    "TesseractServer": "server.server",
    "LocalMixture": "client.local_mixture",
    "holding": "server.holder",
    "load_model": "saving.model",
    "restore_model": "saving.model",
    "save_model": "saving.model",
    "SharedParameters": "shared_parameters",
    "SharedSampler": "shared_sampler",
    "TensorSpec": "wire.tensors",
}
_MODULES = ("errors", "testing", "transformers")

__all__ = [*sorted(_HOMES), *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
