"""Experts in the network: uids, the grid, the manifests by which servers say what they host, and runs.

A uid is a prefix and coordinates joined by dots: ``ffn.3.7`` lies at (3, 7) of the grid ``ffn``.
`manifest` turns what a server hosts into bytes and back (no I/O), `publisher` keeps these bytes in the network,
`directory` finds experts in them.
"""

from tesseract_async.experts.directory import ExpertDirectory
from tesseract_async.experts.grid import ExpertReplica, GridView
from tesseract_async.experts.manifest import Manifest, grid_key, shard_key, split_uid
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.publisher import ExpertPublisher, PublisherSettings

__all__ = [
    "ExpertDirectory",
    "ExpertPattern",
    "ExpertPublisher",
    "ExpertReplica",
    "GridView",
    "Manifest",
    "PublisherSettings",
    "grid_key",
    "shard_key",
    "split_uid",
]
