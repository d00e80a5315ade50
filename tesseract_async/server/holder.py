"""Holding: a node that computes no experts of a run keeps their states on disk, so that they outlive their servers."""

import contextlib
from collections.abc import AsyncIterator, Collection
from functools import partial
from pathlib import Path

from tesseract_async.experts.authority import Authority
from tesseract_async.node import TesseractNode
from tesseract_async.server.capacity import measure_capacity
from tesseract_async.server.placing import Placing
from tesseract_async.server.run_experts import build_run_backend
from tesseract_async.server.server import TesseractServer
from tesseract_async.server.succession import ReplicaKeeper


@contextlib.asynccontextmanager
async def holding(
    node: TesseractNode,
    run: str | Authority,
    *,
    max_bytes: int,
    folder: str | Path | None = None,
    allowed_modules: Collection[str] = (),
    grant: str | None = None,
) -> AsyncIterator[Placing]:
    """Keep states of a run's experts on disk inside the block: for trainers, and for nodes that only route and store.

    At most `max_bytes` are kept in `folder`, by default a temporary one. Which experts these are depends on what
    other members have (`experts.placement`). The node needs a grant with the role ``host``, unless the run is open;
    `grant` is as in `TesseractNode.join_run`. One expert is built, to know what its state looks like: code by import
    path only from `allowed_modules`.

    Raises: as `TesseractNode.join_run` and `build_run_backend`; ValueError if this node may not host in the run.
    """
    authority = await node.join_run(run, grant=grant) if isinstance(run, str) else run
    if not authority.may(node.peer_id, "host", now=None):
        raise ValueError(f"{node.peer_id} may not hold states in {authority.run.full_name}: that takes the role host")
    manifest = authority.run.manifest
    build = partial(build_run_backend, manifest, allowed_modules=allowed_modules)
    server = TesseractServer(node, {}, checkpoint_dir=folder)
    async with server, ReplicaKeeper(server) as keeper:
        capacity, template = await server.call_aside(
            partial(
                measure_capacity,
                partial(build, next(iter(manifest.pattern))),
                room=0,
                hold_bytes=max_bytes,
                folder=server.checkpoint_dir,
            )
        )
        fragments = Placing.of_fragments(server, keeper, authority, *capacity.fragments)
        async with fragments, Placing(server, keeper, authority, capacity, build=build, template=template) as placing:
            yield placing
