"""Part: one piece of the shared parameters at a trainer: when it is due, and the call that is under way.

Work that takes milliseconds for a large piece (packing its difference, applying others' updates and checking their
hash) is done beside the trainer: its `step` only copies values and adds to them.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from tesseract_async.errors import (
    ExpertNotFound,
    NotPrimary,
    Overloaded,
    ProtocolError,
    RemoteError,
    TesseractError,
    describe,
)
from tesseract_async.runtime.encoding import apart
from tesseract_async.server.fragments import read_updates
from tesseract_async.shared_pieces import PAUSE, SharedPieces
from tesseract_async.sharing.fragment import Copy
from tesseract_async.sharing.manifest import FragmentPart
from tesseract_async.wire import messages

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Arrived:
    """The outcome of a call."""

    steps: int = 0
    """All trainers' steps, as pushed so far."""
    change: torch.Tensor | None = None
    """The change to add to the model."""
    counted: bool = False
    error: TesseractError | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """A call, from its start until its answer is added."""

    anchor: torch.Tensor
    """The anchor that the trainer's values build on meanwhile."""
    sent: torch.Tensor | None = None
    """The piece's values at the time of a push."""
    call_id: bytes = b""
    steps: int = 0
    """This trainer's steps at that time."""


@dataclass(slots=True)
class SharedPart:
    """One piece at this trainer. Between the start of a call and `arrived`, its `copy` is the call's."""

    uid: str
    form: FragmentPart
    copy: Copy
    due_at: int
    """This trainer's steps after which the next push is due."""
    steps_then: int = 0
    """This trainer's steps at the last push that counted."""
    steps_sent: int = 0
    """This trainer's steps at the push under way."""
    steps: int = 0
    """All trainers' steps, as they were pushed so far."""
    lost: torch.Tensor | None = None
    """The rest of the values after rounding to the model's 16 bits: without it, small steps would have no effect."""
    asked: Asked | None = None
    """The call under way."""
    failing_since: float | None = None
    """The time (`time.monotonic`) since which its primary does not answer; None while it does."""
    arrived: Arrived | None = None

    async def ask(
        self,
        pieces: SharedPieces,
        method: str,
        request: messages.PushRequest | messages.PullRequest,
        values: torch.Tensor | None,
    ) -> None:
        """Ask until there is an answer, always under the same id, so that a push of these values counts once."""
        own, sends = self.copy, True
        data = b"" if values is None else await self._apart(partial(own.push, values))
        while True:
            try:
                sent, sends = data if sends else b"", False  # who has it answers without it
                message = await pieces.ask(self.uid, method, request, sent)
                self.failing_since = None
                reply = messages.decode(messages.UpdatesReply, message.body)
                if method == messages.PUSH and reply.known and not reply.counted:
                    if sent:
                        raise ProtocolError("a push was answered, but not counted")
                    sends = True
                    continue
                if not reply.known:
                    return await self._take_whole(pieces, reply)
                updates = read_updates(request.version, reply, message.buffers)
                try:
                    change = await self._apart(partial(own.merge, updates, epoch=reply.epoch))
                except ProtocolError as error:
                    logger.warning("%s: %s: it is fetched whole", self.uid, error)
                    return await self._take_whole(pieces, reply)
                self.arrived = Arrived(reply.steps, change, reply.counted)
                return
            except RemoteError as error:
                if not error.retryable and not isinstance(error, NotPrimary | Overloaded | ExpertNotFound):
                    logger.warning("%s: what was learned here is refused: %s", self.uid, describe(error))
                    own.cancel()
                    self.arrived = Arrived(error=error)
                    return
                logger.info("%s: %s", self.uid, describe(error))
                if not isinstance(error, Overloaded):
                    self._fails()
            except (TesseractError, TimeoutError) as error:
                logger.info("%s: %s", self.uid, describe(error))
                if method != messages.PUSH or not isinstance(error, TimeoutError):
                    self._fails()
            await asyncio.sleep(PAUSE)

    def _fails(self) -> None:
        if self.failing_since is None:
            self.failing_since = time.monotonic()

    async def _take_whole(self, pieces: SharedPieces, reply: messages.UpdatesReply) -> None:
        while True:
            try:
                whole, steps = await pieces.fetch_fragment(self.form, min_version=reply.version)
                rebase = partial(self.copy.rebase, whole, epoch=reply.epoch, counted=reply.counted)
                self.arrived = Arrived(steps, await self._apart(rebase), reply.counted)
                return
            except (TesseractError, TimeoutError) as error:
                logger.info("%s cannot be fetched yet: %s", self.uid, describe(error))
            await asyncio.sleep(PAUSE)

    async def _apart(self, work: Callable[[], T]) -> T:
        return await apart(4 * self.copy.cut.numel, work)
