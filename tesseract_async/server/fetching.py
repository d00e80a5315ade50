"""Fetches experts' states in pieces: a sealed file from all servers that have it at once, or a server's newest state
from that server. It also fetches single pieces of copies, to see who has them."""

import asyncio
import io
import logging
import math
import os
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, BinaryIO, Final
from weakref import WeakValueDictionary

from tesseract_async.errors import (
    CheckpointError,
    ConnectionLost,
    Overloaded,
    ProtocolError,
    TesseractError,
    describe,
)
from tesseract_async.experts.own_term import MAX_BEHIND
from tesseract_async.experts.pieces import (
    LIST,
    PIECE_BYTES,
    Ask,
    PieceFetch,
    leaf_of,
    num_leaves,
    piece_size,
    split_list,
)
from tesseract_async.experts.terms import Seal, read_seal
from tesseract_async.files import mapped_file
from tesseract_async.identity import PeerID
from tesseract_async.node import TesseractNode
from tesseract_async.server.state_files import SealedFile, SealedFiles
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import messages

logger = logging.getLogger(__name__)

MIN_RATE: Final = 32 << 10
"""Bytes per second: a source that sends a piece more slowly is dropped, and a state that takes longer is given up."""
LINE_RATE: Final = 128 << 10
"""Bytes per second of a server's line that many pieces share: 1 Mbit/s."""
MAX_STATE_BYTES: Final = 4 << 30
"""A longer file is not fetched, unless it is the state of an expert whose size is known here."""
MAX_BYTES_HERE: Final = 256 << 20
"""A longer file is received on disk."""
NUM_RETRIES: Final = 3
"""Times that a server is asked again for its newest state, after the connection broke or the state was replaced."""

Aside = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs work on files where it holds up nothing else."""


async def _here(work: Callable[[], Any]) -> Any:
    return work()


class _NotThere(ProtocolError):
    """The source does not have the file, or not any more."""


class _Transfer:
    """One file on its way into `into`, which may hold pieces already if `has_some`."""

    def __init__(
        self,
        node: TesseractNode,
        request: messages.StateRequest,
        sources: Iterable[PeerAddress],
        into: BinaryIO,
        *,
        size: int,
        timeout: float,
        has_some: bool = False,
        aside: Aside = _here,
    ) -> None:
        """`request`: for any piece, with the file's root."""
        self.fetch: PieceFetch[PeerAddress] = PieceFetch(request.root, size, silence=timeout + PIECE_BYTES / MIN_RATE)
        for source in sources:
            path = node.path(source)
            self.fetch.add(source, rate=0.0 if path is None else path[1])
        self._node, self._uid, self._request, self._aside = node, request.uid, request, aside
        self._into, self._has_some, self._timeout = into, has_some, timeout + size / MIN_RATE
        self._tasks: dict[asyncio.Task[None], Ask[PeerAddress]] = {}
        self._error: Exception = ProtocolError(f"nobody is known to have the state of {request.uid}")

    async def run(self) -> None:
        """Fetch the file. Raises: the last source's error; TimeoutError; OSError if `into` cannot be written."""
        fetch, loop = self.fetch, asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout):
                while not fetch.is_done:
                    now = loop.time()
                    for source in fetch.leave_silent(now):
                        self._left(source, TimeoutError(f"{source.short} stopped sending the state of {self._uid}"))
                    for ask in fetch.asks(now):
                        self._tasks[loop.create_task(self._ask(ask), name="server: state")] = ask
                    if fetch.is_hopeless:
                        raise self._error
                    await self._wait(fetch.wake_at(now) - now)
        finally:
            self._withdraw(lambda ask: True)
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _wait(self, seconds: float) -> None:
        if not self._tasks:
            return await asyncio.sleep(seconds)
        timeout = None if math.isinf(seconds) else seconds
        done, _ = await asyncio.wait(self._tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            del self._tasks[task]
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error  # of the disk, which is no source's fault

    def _withdraw(self, condition: Callable[[Ask[PeerAddress]], bool]) -> None:
        for task, ask in self._tasks.items():
            if condition(ask):
                task.cancel()

    def _left(self, source: PeerAddress, error: Exception) -> None:
        logger.info("the state of %s is not fetched from %s any more: %s", self._uid, source.short, describe(error))
        self._error = error
        self._withdraw(lambda ask: ask.source == source)

    async def _ask(self, ask: Ask[PeerAddress]) -> None:
        fetch, (source, piece), loop = self.fetch, ask, asyncio.get_running_loop()
        request = self._request._replace(piece=piece)
        try:
            # a queue's last piece comes after the others
            head, data = await ask_piece(self._node, source, request, timeout=2 * fetch.silence)
            if head.size == 0:
                raise _NotThere(f"{source.short} does not have that state of {self._uid}")
            if (head.root, head.size, head.piece) != (fetch.root, fetch.size, piece):
                raise ProtocolError(f"{self._uid}: {source.short} sent another piece than was asked for")
            await self.take(source, piece, data)
        except (ConnectionLost, Overloaded, TimeoutError) as error:
            fetch.failed(source, piece, describe(error), loop.time(), retry_after=getattr(error, "retry_after", 0.0))
            if source in fetch.dropped:
                self._left(source, error)
        except TesseractError as error:
            fetch.drop(source, describe(error))
            self._left(source, error)

    async def take(self, source: PeerAddress, piece: int, data: memoryview) -> None:
        """Check a piece, and put it where it belongs. Raises: ProtocolError for a wrong one; OSError."""
        fetch, loop = self.fetch, asyncio.get_running_loop()
        is_list = piece == LIST and piece_size(LIST, fetch.size) != fetch.size
        leaves: list[bytes] = []
        had: set[int] = set()

        def check() -> bool:
            if not fetch.is_right(piece, data):
                return False
            if is_list:
                leaves.extend(split_list(data))
                if self._has_some:
                    had.update(number for number, leaf in enumerate(leaves, 1) if self._holds(number, leaf))
            else:
                self._into.seek(max(0, piece - 1) * PIECE_BYTES)
                self._into.write(data)
            return True

        if not await self._aside(check):
            raise ProtocolError(f"{self._uid}: {source.short} sent a wrong piece of its state")
        others = fetch.arrived(source, piece, loop.time())
        self._withdraw(others.__contains__)
        if is_list and not fetch.leaves:
            fetch.take_list(leaves, had)

    def _holds(self, number: int, leaf: bytes) -> bool:
        self._into.seek((number - 1) * PIECE_BYTES)
        return leaf_of(self._into.read(piece_size(number, self.fetch.size))) == leaf


def seconds_for(num_pieces: int) -> float:
    """Return the seconds that a server has for each of this many pieces that share its line."""
    return 60.0 + num_pieces * PIECE_BYTES / LINE_RATE


async def ask_piece(
    node: TesseractNode, peer: PeerAddress, request: messages.StateRequest, *, timeout: float
) -> tuple[messages.StateReply, memoryview]:
    """Return a piece, unchecked. Raises: as `TesseractNode.call_expert`; ProtocolError for what is no answer."""
    body = messages.encode(request)
    # between other messages of a connection it waits
    reply = await node.call_expert(
        peer, messages.STATE, body, timeout=timeout, idempotent=True, priority=messages.LOWEST_PRIORITY
    )
    head = messages.decode(messages.StateReply, reply.body)
    if len(reply.buffers) != (head.size > 0):
        raise ProtocolError(f"{request.uid}: a piece of its state that does not fit")
    return head, reply.buffers[0] if reply.buffers else memoryview(b"")


async def fetch_state(
    node: TesseractNode,
    peer: PeerAddress,
    uid: str,
    *,
    weights_only: bool = False,
    min_version: int = 0,
    point: bytes = messages.NO_POINT,
    max_bytes: int = MAX_STATE_BYTES,
    timeout: float = 60.0,
) -> bytes | memoryview | None:
    """Return the file of an expert's newest state at a server; None before `min_version`. Or that of a save point.

    `timeout` is for each piece; one, and the whole, may take longer by its size at `MIN_RATE`. Raises: as
    `TesseractNode.call_expert`; ProtocolError for too long a file, or pieces that do not fit together; TimeoutError.
    """
    request = messages.StateRequest(uid, weights_only, min_version, messages.NO_ROOT, LIST, point)
    left = NUM_RETRIES
    while True:
        left -= 1
        try:
            head, first = await ask_piece(node, peer, request, timeout=timeout)
        except ConnectionLost:
            if left < 0:
                raise
            continue
        if head.size == 0:
            return None
        if head.size > max_bytes:
            raise ProtocolError(f"{uid}: a state of {head.size} bytes; at most {max_bytes} are fetched")
        into = _anywhere(head.size)
        piece = request._replace(min_version=0, root=head.root)
        transfer = _Transfer(node, piece, [peer], into, size=head.size, timeout=timeout)
        await transfer.take(peer, LIST, first)
        try:
            await transfer.run()
            return _content(into)
        except _NotThere:  # it has a newer copy now, and the one before is gone
            if left < 0:
                raise ProtocolError(f"{uid}: the server changes its state faster than it sends it") from None


async def fetch_sealed(
    node: TesseractNode, uid: str, seal: Seal, sources: Iterable[PeerAddress], *, timeout: float = 60.0
) -> bytes | memoryview:
    """Return the file of this Seal, from all `sources` at once: it has the right root. It is kept nowhere.

    `timeout` is as in `fetch_state`. Raises: ProtocolError for too long a file; what the last source failed with;
    TimeoutError.
    """
    if seal.size > MAX_STATE_BYTES:
        raise ProtocolError(f"{uid}: a state of {seal.size} bytes; at most {MAX_STATE_BYTES} are fetched")
    into = _anywhere(seal.size)
    await _Transfer(node, _piece_of(uid, seal), sources, into, size=seal.size, timeout=timeout).run()
    return _content(into)


def _anywhere(size: int) -> BinaryIO:
    return io.BytesIO() if size <= MAX_BYTES_HERE else tempfile.TemporaryFile()


def _content(into: BinaryIO) -> bytes | memoryview:
    return into.getvalue() if isinstance(into, io.BytesIO) else mapped_file(into)


class SealFetcher:
    """Fetches sealed files into the folder of `files`, piece by piece; interrupted, it goes on where it stopped."""

    def __init__(self, node: TesseractNode, files: SealedFiles, *, timeout: float, aside: Aside) -> None:
        """`timeout`: seconds for each piece, and longer by its size at `MIN_RATE`; `aside` runs work on files."""
        self._node, self._files, self._timeout, self._aside = node, files, timeout, aside
        self._locks: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()

    async def fetch(self, uid: str, seal: Seal, sources: Iterable[PeerAddress], *, max_bytes: int) -> SealedFile:
        """Return the file of this Seal, from here or from all `sources` at once: it has the right root.

        It is not among `files` yet (`SealedFiles.take_in`). `max_bytes`: as long as a state of this expert can be.
        Raises: ProtocolError for a longer one; CheckpointError if the disk is full; what the last source failed with.
        """
        if seal.size > max_bytes:
            raise ProtocolError(f"{uid}: a state of {seal.size} bytes; at most {max_bytes} are fetched")
        async with self._locks.setdefault(seal.root, asyncio.Lock()):
            if (found := self._files.find(uid, seal.root)) is not None:
                return found
            try:
                with self._files.open_part(uid, seal.root) as part:
                    has_some = await self._aside(partial(_take_room, part, seal.size))
                    transfer = _Transfer(
                        self._node,
                        _piece_of(uid, seal),
                        sources,
                        part,
                        size=seal.size,
                        timeout=self._timeout,
                        has_some=has_some,
                        aside=self._aside,
                    )
                    await transfer.run()
                    await self._aside(partial(_finish, part, durable=self._files.is_durable))
            except OSError as error:
                if isinstance(error, TimeoutError):
                    raise
                raise CheckpointError(f"the state of {uid} cannot be written here: {describe(error)}") from error
            leaves = transfer.fetch.leaves or [leaf_of(await self._aside(Path(part.name).read_bytes))]
            return SealedFile(seal.root, seal.size, leaves, Path(part.name))


def _piece_of(uid: str, seal: Seal) -> messages.StateRequest:
    return messages.StateRequest(uid, False, 0, seal.root, LIST)


def _take_room(file: BinaryIO, size: int) -> bool:
    """Take all its room on the disk, so that a full one is noticed at once. Returns whether it was there before."""
    if os.fstat(file.fileno()).st_size == size:
        return True
    file.truncate(0)
    if size and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    return False


def _finish(file: BinaryIO, *, durable: bool) -> None:
    file.flush()
    if durable:
        os.fsync(file.fileno())


async def ask_records(node: TesseractNode, uid: str, peer: PeerAddress, *, timeout: float) -> list[bytes]:
    """Return the Term by which a member goes, and the Seal whose file it says it has: untrusted, and unread.

    Raises: as `TesseractNode.call_expert`.
    """
    question = messages.encode(messages.TenureRequest(uid, "probe", 0, [b"", b"", b""]))
    reply = await node.call_expert(peer, messages.TENURE, question, timeout=timeout, idempotent=True)
    return messages.decode(messages.TenureReply, reply.body).records


async def ask_seal(node: TesseractNode, run: bytes, uid: str, peer: PeerAddress, *, timeout: float) -> Seal:
    """Return the Seal whose file a member says it has. Raises: as `ask_records`; ProtocolError if it shows none."""
    seal = read_seal([*await ask_records(node, uid, peer, timeout=timeout), b"", b""][1], run)
    if seal.uid != uid:
        raise ProtocolError(f"{peer.short} shows the Seal of another expert than {uid}")
    return seal


async def find_shown(
    node: TesseractNode,
    run: bytes,
    newest: Seal,
    peers: Mapping[PeerID, PeerAddress],
    *,
    timeout: float,
    random: Random,
) -> set[PeerID]:
    """Return those of the `peers` that show a random piece of a file which the primary of `newest` sealed lately."""
    uid = newest.uid

    async def shows(address: PeerAddress) -> bool:
        try:
            seal = await ask_seal(node, run, uid, address, timeout=timeout)
            if (seal.primary, seal.term) != (newest.primary, newest.term) or seal.number < newest.number - MAX_BEHIND:
                raise ProtocolError(f"{address.short} has an old state of {uid}, or one that its primary did not seal")
            plan: PieceFetch[PeerAddress] = PieceFetch(seal.root, seal.size, silence=timeout)
            hashes = await ask(address, plan, LIST)
            if num_leaves(seal.size) > 1:
                plan.take_list(split_list(hashes))
                await ask(address, plan, random.randrange(1, len(plan.leaves) + 1))
        except (TesseractError, TimeoutError, OSError) as error:
            logger.info("%s does not show the state of %s: %s", address.short, uid, describe(error))
            return False
        return True

    async def ask(address: PeerAddress, plan: PieceFetch[PeerAddress], piece: int) -> memoryview:
        request = messages.StateRequest(uid, False, 0, plan.root, piece)
        _, data = await ask_piece(node, address, request, timeout=timeout)
        if not plan.is_right(piece, data):
            raise ProtocolError(f"{address.short} sent a wrong piece of the state of {uid}")
        return data

    found = await asyncio.gather(*map(shows, peers.values()))
    return {peer for peer, is_shown in zip(peers, found, strict=True) if is_shown}
