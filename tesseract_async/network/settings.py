"""The numbers of the network that a rehearsal may change; nodes have the defaults."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """The settings of a `testing.SimulatedNetwork`; its defaults are what a `TesseractNode` has."""

    join_timeout: float = 5.0
    """Seconds for which a read or write of a node that was given seeds waits for its first contact."""
    min_timeout: float = 0.15
    """Shortest wait in seconds for a reply, however fast the peer was before: event loops pause for garbage and for
    others."""
    republish_period: float = 600.0
    """Seconds after which holders compare what they hold with the nodes closest to the key: in a swarm whose nodes stay
    for minutes, records outlive them only if it is shorter, which costs as much more traffic."""
