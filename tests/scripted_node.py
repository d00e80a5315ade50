"""A real node whose calls and reads a test can hold up, change or let fail, as a bad network or another peer would."""

from collections.abc import Awaitable, Callable
from typing import Any

import tesseract_async as ta
from tesseract_async.network.network import TesseractNetwork


class Instead:
    """Anything, but for the attributes that a test gives it: to hand to what is tested."""

    def __init__(self, real: Any, **instead: Any) -> None:
        self.real = real
        self.__dict__.update(instead)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class ScriptedNode(ta.TesseractNode):
    """What the scripts are given first is the real method, for those that pass it on."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.on_call: Callable[..., Awaitable[Any]] | None = None
        """``await on_call(call, peer, method, *rest, **options)`` instead of each call of an expert's method."""
        self.on_read: Callable[..., Awaitable[Any]] | None = None
        """``await on_read(read, key)`` instead of each read of the network's entries."""
        self.is_cut_off = False
        """True where the network is to look as if nobody else were in it."""
        super().__init__(*args, **options)

    @property
    def network(self) -> Any:
        return self._network

    @network.setter
    def network(self, network: TesseractNetwork) -> None:
        self._network = _ScriptedNetwork(network, self)

    async def call_expert(self, peer: Any, method: str, *rest: Any, **options: Any) -> Any:
        call = super().call_expert
        if self.on_call is None:
            return await call(peer, method, *rest, **options)
        return await self.on_call(call, peer, method, *rest, **options)


class _ScriptedNetwork:
    """The node's network, but for what the test has to say."""

    def __init__(self, network: TesseractNetwork, node: ScriptedNode) -> None:
        self.__dict__.update(real=network, node=node)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["real"], name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.real, name, value)

    async def get_entries(self, key: str) -> Any:
        script: Any = self.node.on_read
        return await (self.real.get_entries(key) if script is None else script(self.real.get_entries, key))

    async def wait_joined(self, timeout: float | None = None) -> bool:
        return not self.node.is_cut_off and await self.real.wait_joined(timeout)
