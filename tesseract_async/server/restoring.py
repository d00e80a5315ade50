"""Answers ``expert.restore``: an expert goes back to a state that its owner kept (`saving.restorer`)."""

import asyncio
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import CheckpointError, NotAllowed, Overloaded, ProtocolError, RemoteError, describe
from tesseract_async.experts.manifest import split_uid
from tesseract_async.experts.pieces import PIECE_BYTES, root_of
from tesseract_async.files import mapped_file
from tesseract_async.identity import PeerID
from tesseract_async.node import TesseractNode
from tesseract_async.runtime.states import StateDict
from tesseract_async.server.checkpoint import largest_state
from tesseract_async.server.fetching import Aside
from tesseract_async.server.hosted import HostedState
from tesseract_async.server.other_replicas import check_fitting, is_near_path
from tesseract_async.wire import messages

MAX_UNDER_WAY: Final = 16
"""The most states that arrive at one server at a time."""
KEEP_SECONDS: Final = 60.0
"""Seconds without a new piece after which a state gives way to another."""


@dataclass(slots=True)
class _Arriving:
    file: BinaryIO
    root: bytes
    size: int
    num_bytes: int
    used: float


class Restoring:
    """Takes states that are sent in pieces, in order. Lives on the node's loop."""

    def __init__(
        self,
        node: TesseractNode,
        folder: Path | None,
        aside: Aside,
        drop: Callable[[str], None],
    ) -> None:
        """`folder`: where what arrives is written; None: where temporary files are. `aside` runs work on files; `drop`
        forgets the copies of an expert's state."""
        self._node, self._folder, self._aside, self._drop = node, folder, aside, drop
        self._arriving: dict[tuple[PeerID, str], _Arriving] = {}
        self.lay_aside: Callable[[str, memoryview], Path | None] = lambda uid, data: None
        """Keeps the state of an expert of a run, until the run's owner names it; None if it cannot."""

    def close(self) -> None:
        for one in self._arriving.values():
            one.file.close()
        self._arriving.clear()

    async def answer(self, hosted: HostedState, call: IncomingCall) -> Message:
        """Take a piece; with the last, go on from the state. Raises only RemoteErrors."""
        request = messages.decode(messages.RestoreRequest, call.body)
        self._check_caller(hosted.uid, call.peer_id)
        one = self._find(hosted, call, request)
        part = call.buffers[0] if len(call.buffers) == 1 else memoryview(b"")
        wanted = min(PIECE_BYTES, one.size - request.offset)
        if len(part) != wanted or request.offset > one.num_bytes:
            raise ProtocolError(f"{hosted.uid}: a piece of a state that does not fit")
        one.file.seek(request.offset)
        one.file.write(part)
        one.num_bytes = max(one.num_bytes, request.offset + wanted)
        one.used = asyncio.get_running_loop().time()
        if one.num_bytes == one.size:
            del self._arriving[(call.peer_id, hosted.uid)]
            try:
                await self._take(hosted, one)
            except (CheckpointError, OSError) as error:
                raise RemoteError(f"{hosted.uid} cannot go on from that state: {describe(error)}") from error
            finally:
                one.file.close()
        return Message(messages.encode(messages.RestoreReply(hosted.version)))

    def _check_caller(self, uid: str, peer: PeerID) -> None:
        """Raises: NotAllowed unless the caller owns the expert's run, or it is a machine of one's own."""
        node = self._node
        if (authority := node.trust.authority(split_uid(uid)[0])) is not None:
            if not authority.rules(peer):
                raise NotAllowed(f"only the owner of {authority.run.full_name} restores its experts")
            return
        paths = [one.path for one in node.endpoint.connections() if one.peer_id == peer]
        is_own = all(map(is_near_path, paths)) if node.policy.hosts is None else peer in node.policy.hosts
        if peer != node.peer_id and not (paths and is_own):
            raise NotAllowed(f"{peer.short} is not on this server's own network, nor on its list: it restores nothing")

    def _find(self, hosted: HostedState, call: IncomingCall, request: messages.RestoreRequest) -> _Arriving:
        at, now = (call.peer_id, hosted.uid), asyncio.get_running_loop().time()
        one = self._arriving.get(at)
        if one is not None and (one.root, one.size) == (request.root, request.size) and request.offset:
            return one
        if request.offset or not 0 < request.size <= largest_state(hosted.backend) + (1 << 20):
            raise ProtocolError(f"{hosted.uid}: a state that does not begin at its start, or is too large")
        for old, arriving in list(self._arriving.items()):
            if old == at or now - arriving.used > KEEP_SECONDS:
                self._arriving.pop(old).file.close()
        if len(self._arriving) >= MAX_UNDER_WAY:
            raise Overloaded("other states are being restored here", retry_after=5.0)
        file: BinaryIO = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        one = self._arriving[at] = _Arriving(file, request.root, request.size, 0, now)
        return one

    async def _take(self, hosted: HostedState, one: _Arriving) -> None:
        aside, uid = self._aside, hosted.uid
        one.file.flush()
        data = mapped_file(one.file)

        def check() -> StateDict:
            if root_of(data) != one.root:
                raise CheckpointError("it is not the state that was named")
            return check_fitting(uid, hosted.backend, data)

        try:
            state = await aside(check)
        except ProtocolError as error:
            raise CheckpointError(str(error)) from error
        if self._node.trust.authority(split_uid(uid)[0]) is not None:
            if await aside(partial(self.lay_aside, uid, data)) is None:
                raise CheckpointError("this server keeps no checkpoints (--checkpoint-dir)")
            return
        await hosted.take(state, aside=True)
        self._drop(uid)
