"""Rehearse a swarm in one process and in virtual time: thousands of nodes of the real protocol, seeded, no sockets.

::

    from tesseract_async.testing import SimulatedNetwork, log_normal_latency

    network = SimulatedNetwork(seed=1, latency=log_normal_latency(median_rtt=0.08, sigma=0.5), loss=0.1)
    nodes = network.add_swarm(100)                 # they join through the first, in virtual time
    network.store(nodes[3], "key", {"any": "value"}, ttl=600.0)
    network.kill(nodes[10:40])                     # without farewell
    assert network.get(nodes[50], "key") == {"any": "value"}

The same seed gives the same run, to the byte (`SimulatedNetwork.trace`). Failures can be written down as data: see
`FaultScript`.
"""

from tesseract_async.testing.clock import VirtualClock
from tesseract_async.testing.faults import Fault, FaultScript, Heal, Join, Kill, Leave, Partition, SetLoss
from tesseract_async.testing.malicious import LyingProtocol
from tesseract_async.testing.simulation import (
    Latency,
    SimulatedIdentity,
    SimulatedNetwork,
    SimulatedNode,
    log_normal_latency,
)

__all__ = [
    "Fault",
    "FaultScript",
    "Heal",
    "Join",
    "Kill",
    "Latency",
    "Leave",
    "LyingProtocol",
    "Partition",
    "SetLoss",
    "SimulatedIdentity",
    "SimulatedNetwork",
    "SimulatedNode",
    "VirtualClock",
    "log_normal_latency",
]
