"""The loads on which several frameworks are compared, in one place. Standard library only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """Client processes that call the experts of one server process on loopback.

    `num_clients` processes each run `num_callers` calls at once; each call carries `rows` x `width` float32 values.
    """

    name: str
    kind: str
    rows: int
    width: int
    num_clients: int
    num_callers: int = 1
    num_experts: int = 1
    backward: bool = False
    max_batch_size: int = 8192
    seconds: float = 4.0


COMPARED = (
    Load("nop 1x1024, 8 clients", "nop", 1, 1024, 8),
    Load("nop 1x1024, 1 client with 8 callers", "nop", 1, 1024, 1, num_callers=8),
    Load("nop 2048x1024, 4 clients", "nop", 2048, 1024, 4),
    Load("ffn 256x256, 8 clients", "ffn", 256, 256, 8, backward=True, max_batch_size=1024),
    Load("ffn 4x256, 16 clients", "ffn", 4, 256, 16, backward=True, max_batch_size=1024),
)


SMALL = (
    COMPARED[0],
    COMPARED[1],
    Load("nop 1x1024, 1 caller, forward and backward", "nop", 1, 1024, 1, backward=True),
)
"""On which frameworks for remote calls are compared, too."""


@dataclass(frozen=True)
class DhtLoad:
    """Each worker's round: a fresh key, `num_stores` nodes store one subkey each, then `num_gets` nodes read the key.

    `num_killed` nodes, which no worker uses, are killed without a farewell after a third of the rounds.
    """

    num_nodes: int = 16
    num_workers: int = 4
    num_rounds: int = 16
    num_stores: int = 8
    num_gets: int = 8
    num_killed: int = 2
    num_seeds: int = 4
    ttl: float = 300.0

    @property
    def num_operations(self) -> int:
        return self.num_workers * self.num_rounds * (self.num_stores + self.num_gets)


@dataclass(frozen=True)
class MixtureLoad:
    """One batch through a gate over a grid of which `num_live` cells hold a live `nop` expert, all on one server."""

    rows: int = 2048
    width: int = 1024
    grid_size: tuple[int, ...] = (64, 64)
    num_live: int = 64
    k_best: int = 4
    seed: int = 7

    def uids(self, prefix: str = "ffn") -> list[str]:
        """The live experts, spread over the grid by a fixed rule: one in each row and column."""
        stride = 27  # coprime with 64: visits every column once
        first, second = self.grid_size
        return [f"{prefix}.{index % first}.{index * stride % second}" for index in range(self.num_live)]
