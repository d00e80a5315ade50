"""The numbers of the network that its user may choose."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """The defaults suit the open internet and a single machine alike."""

    join_timeout: float = 5.0
    """Seconds for which a read or write waits for the first contact of a node that was given seeds. More where seeds
    start late or lines are slow; less where a program would rather go on alone."""
    min_timeout: float = 0.15
    """Shortest wait in seconds for a reply, however fast the peer was before: event loops pause for garbage and for
    others. More on machines so busy that they answer late, and would be taken for dead."""
    max_storage_bytes: int = 256 * 2**20
    """Bytes of records held for others; beyond them new entries are refused. Less on a computer with little memory."""
    republish_period: float = 600.0
    """Seconds after which holders compare what they hold with the nodes closest to the key. Less in a swarm whose nodes
    stay for minutes, so that records outlive them; it costs as much more traffic."""
