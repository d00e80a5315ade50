"""The experts that every side of a comparison serves: the same modules, so that only the framework differs."""

import torch


class Nop(torch.nn.Module):
    """Returns a copy of its input: what is left of a call is the framework."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


class FeedForward(torch.nn.Module):
    """A transformer's feed-forward layer: width -> 4 x width -> width, GELU, residual, layer norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = torch.nn.Linear(width, 4 * width)
        self.down = torch.nn.Linear(4 * width, width)
        self.norm = torch.nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.gelu(self.up(x), approximate="tanh")
        return self.norm(x + self.down(hidden))


KINDS: dict[str, type[torch.nn.Module]] = {"nop": Nop, "ffn": FeedForward}
