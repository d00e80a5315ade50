"""Failures as data: the faults of a simulated swarm, and their times."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tesseract_async.testing.simulation import SimulatedNetwork, SimulatedNode


class Fault(Protocol):
    """Something that happens to a network at one moment."""

    def happen(self, network: SimulatedNetwork) -> None:
        """Make the fault happen."""


@dataclass(frozen=True, slots=True)
class Kill:
    """A share of all living nodes vanishes without a farewell."""

    share: float

    def happen(self, network: SimulatedNetwork) -> None:
        network.kill(_sample(network, self.share))


@dataclass(frozen=True, slots=True)
class Leave:
    """A share of all living nodes says farewell and goes."""

    share: float

    def happen(self, network: SimulatedNetwork) -> None:
        network.leave(_sample(network, self.share))


@dataclass(frozen=True, slots=True)
class Join:
    """`count` nodes come, each through a random living one."""

    count: int

    def happen(self, network: SimulatedNetwork) -> None:
        for _ in range(self.count):
            network.add_node([network.random.choice(network.alive())])


@dataclass(frozen=True, slots=True)
class Partition:
    """A share of all living nodes is cut off from the rest, in both directions."""

    share: float

    def happen(self, network: SimulatedNetwork) -> None:
        apart = set(map(id, _sample(network, self.share)))
        here = [node for node in network.alive() if id(node) not in apart]
        network.partition(here, [node for node in network.alive() if id(node) in apart])


@dataclass(frozen=True, slots=True)
class Heal:
    """The partition ends."""

    def happen(self, network: SimulatedNetwork) -> None:
        network.heal()


@dataclass(frozen=True, slots=True)
class SetLoss:
    """From now on a share of all datagrams is lost."""

    share: float

    def happen(self, network: SimulatedNetwork) -> None:
        network.loss = self.share


@dataclass(frozen=True, slots=True)
class FaultScript:
    """Faults and the seconds, counted from `apply`, at which they happen."""

    faults: Sequence[tuple[float, Fault]]

    def apply(self, network: SimulatedNetwork) -> None:
        """Schedule the faults. They happen as `SimulatedNetwork.run` lets time pass."""
        for delay, fault in self.faults:
            network.clock.call_later(delay, fault.happen, network)


def _sample(network: SimulatedNetwork, share: float) -> list[SimulatedNode]:
    living = network.alive()
    return network.random.sample(living, round(share * len(living)))
