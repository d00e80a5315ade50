"""SharedPieces: the pieces of the shared parameters in the network: who hosts them, their states, calls to them."""

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import torch

from tesseract_async.endpoint.endpoint import Message
from tesseract_async.errors import (
    ConnectionLost,
    ExpertNotFound,
    NotPrimary,
    Overloaded,
    PeerUnreachable,
    ProtocolError,
    TesseractError,
)
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.experts.manifest import join_uid
from tesseract_async.node import TesseractNode
from tesseract_async.runtime.encoding import apart
from tesseract_async.server.checkpoint import check_state
from tesseract_async.server.fetching import fetch_state
from tesseract_async.server.fragments import MAX_STATE_BYTES, read_fragment, read_manifest, read_updates
from tesseract_async.server.other_replicas import may_follow
from tesseract_async.sharing.fragment import Fragment
from tesseract_async.sharing.layout import Layout
from tesseract_async.sharing.manifest import FragmentPart, SharedManifest
from tesseract_async.tasks import end
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import messages

CALL_TIMEOUT: Final = 20.0
PUSH_TIMEOUT: Final = 10.0
"""Seconds that a push waits for its round to close, before it is asked what became of it."""
PAUSE: Final = 0.5
"""Seconds after a call that failed, before the next one."""
NUM_TRIES: Final = 3
"""The most states of a piece that are fetched until one matches its primary's: the first may come from a follower that
lies."""
NUM_AT_ONCE: Final = 6
"""Pieces that are fetched at the same time."""


@dataclass(slots=True)
class FoundPieces:
    """The run's manifest and the fragments' states, at entry."""

    manifest: SharedManifest
    fragments: list[tuple[Fragment, int]] = field(default_factory=list)
    epoch: int = 0


class SharedPieces:
    """The pieces under one prefix. Lives on the node's loop."""

    def __init__(self, node: TesseractNode, prefix: str, *, is_bare: bool) -> None:
        """`is_bare`: the prefix belongs to no run, so that only machines of one's own network are asked."""
        self._node, self.prefix, self._is_bare = node, prefix, is_bare
        self._primaries: dict[str, bytes | None] = {}
        self._asked: Counter[PeerAddress] = Counter()
        """Pieces that are being fetched, by host."""

    def uid(self, number: int) -> str:
        return join_uid(self.prefix, (number,))

    async def fetch_all(self, layout: Layout) -> FoundPieces:
        """Return the pieces of a model of this layout.

        Raises: LayoutMismatch, if the run's model is another one; ExpertNotFound; what the calls raise.
        """
        gate, known = asyncio.Semaphore(NUM_AT_ONCE), asyncio.get_running_loop().create_future()

        async def fetch(number: int) -> tuple[Fragment, int]:
            async with gate:
                # the first, with the manifest, from the primary; the others from all hosts, none of which waits for it
                found = await self.fetch_state(number, spreads=number > 0)
                if number == 0:
                    manifest = read_manifest(found[0])
                    manifest.layout.check(layout)
                    known.set_result(manifest)
                return await self.fetch_fragment((await known).part(number), found)

        tasks = [asyncio.ensure_future(fetch(number)) for number in range(len(layout.cuts))]
        try:
            fragments = await asyncio.gather(*tasks)
        finally:
            await end(*tasks)
        return FoundPieces(await known, fragments)

    async def fetch_fragment(
        self, form: FragmentPart, found: tuple[dict[str, torch.Tensor], int] | None = None, *, min_version: int = 0
    ) -> tuple[Fragment, int]:
        """Return a fragment as its primary has it, whichever host gave its state, and the steps that were pushed to it.

        `found`: a state that came already. Raises: NotPrimary if no host shows the primary's state; as `fetch_state`
        and `ask`.
        """
        uid, num_bytes = self.uid(form.number), 4 * form.cut.numel
        for _ in range(NUM_TRIES):
            tensors, version = found or await self.fetch_state(form.number, min_version=min_version)
            fragment, _ = await apart(num_bytes, partial(read_fragment, form, tensors, version))
            request = messages.PullRequest(uid, fragment.version, fragment.root)
            message = await self.ask(uid, messages.PULL, request, b"")
            reply = messages.decode(messages.UpdatesReply, message.body)
            if reply.known:
                updates = read_updates(fragment.version, reply, message.buffers)
                await apart(num_bytes, partial(fragment.replay, updates))
                return fragment, reply.steps
            found = None
        raise NotPrimary(f"the hosts of {uid} have other states than its primary")

    async def fetch_state(
        self, number: int, *, spreads: bool = False, min_version: int = 0
    ) -> tuple[dict[str, torch.Tensor], int]:
        """Return a fragment's state from one of its hosts: the primary first or, with `spreads`, the host that is asked
        for the fewest pieces now."""
        uid = self.uid(number)
        replicas = await self.find(uid)
        if spreads:
            replicas.sort(key=lambda one: self._asked[one.peer])
        last: BaseException = ExpertNotFound(f"nobody hosts {uid}")
        for replica in replicas:
            self._asked[replica.peer] += 1
            try:
                file = await fetch_state(
                    *(self._node, replica.peer, uid),
                    min_version=min_version,
                    weights_only=True,
                    max_bytes=MAX_STATE_BYTES,
                    timeout=CALL_TIMEOUT,
                )
                if file is not None:
                    return await apart(len(file), partial(_read, uid, file))
            except (TesseractError, TimeoutError) as error:
                last = error
                self._failed(replica, error)
            finally:
                self._asked[replica.peer] -= 1
        raise last

    async def num_hosts(self) -> int:
        """Return how many servers host the first piece. Raises: ExpertNotFound if none does."""
        return len(await self.find(self.uid(0)))

    async def ask(
        self,
        uid: str,
        method: str,
        request: messages.PushRequest | messages.PullRequest | messages.SamplesRequest,
        data: bytes,
    ) -> Message:
        """Ask the primary. Raises: what the call raises, after taking note of it."""
        replica = (await self.find(uid))[0]
        body = list(request)
        buffers = [memoryview(data)] if data else []
        timeout = PUSH_TIMEOUT if method == messages.PUSH else CALL_TIMEOUT
        try:
            return await self._node.call_expert(replica.peer, method, body, buffers, timeout=timeout, idempotent=True)
        except NotPrimary as error:
            self._primaries[uid] = error.primary
            await asyncio.sleep(min(error.retry_after, CALL_TIMEOUT))
            raise
        except Overloaded as error:
            await asyncio.sleep(min(error.retry_after, CALL_TIMEOUT))
            raise
        except (TesseractError, TimeoutError) as error:
            self._failed(replica, error)
            raise

    async def find(self, uid: str) -> list[ExpertReplica]:
        """Return who hosts it, the primary first. Raises: ExpertNotFound; TimeoutError if the network is silent."""
        replicas = await self._node.directory.find(uid, even_failed=True)
        if self._is_bare:
            replicas = [one for one in replicas if may_follow(self._node, one)]
        if not replicas:
            raise ExpertNotFound(f"nobody hosts {uid} of the shared parameters")
        named = self._primaries.get(uid)
        return sorted(replicas, key=lambda one: named is None or one.peer.peer_id != named)

    def _failed(self, replica: ExpertReplica, error: BaseException) -> None:
        self._primaries.pop(replica.uid, None)
        if isinstance(error, PeerUnreachable | ConnectionLost | ExpertNotFound | ProtocolError):
            self._node.directory.report_failure(replica)


def _read(uid: str, file: bytes | memoryview) -> tuple[dict[str, torch.Tensor], int]:
    """Return a state's tensors, writable and not the file's, and its version. Raises: ProtocolError."""
    state = check_state(uid, file, weights_only=True)
    return {name: tensor.clone() for name, tensor in state["module"].items()}, state["version"]
