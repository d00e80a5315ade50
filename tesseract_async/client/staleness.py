"""Answers that are not too old: followers answer from weights that they pulled from the primary some time ago."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch

from tesseract_async.client.expert_calls import Answer, fetch_version
from tesseract_async.client.replicas import Attempt, Shared, cancel_all
from tesseract_async.errors import ExpertNotFound, TesseractError, TooStale, describe

Forwarded = tuple[list[torch.Tensor], Answer]


def fresh_enough(
    shared: Shared, uid: str, replicas: Sequence[Any], attempt: Attempt[Forwarded], max_staleness: int | None
) -> tuple[Sequence[Any], Attempt[Forwarded]]:
    """Whom to ask, and how, so that no answer lacks more than `max_staleness` of the steps that the primary has taken.

    0: the primary only. More: followers, too; beside each of their answers the primary is asked for its version, a
    small question, and an older answer is `TooStale`, so that the next replica is asked. None: anybody.

    Raises: ExpertNotFound if nobody says that it is the primary.
    """
    if max_staleness is None:
        return replicas, attempt
    primaries = [replica for replica in replicas if replica.primary]
    if not primaries:
        raise ExpertNotFound(f"nobody is the primary of {uid} now: max_staleness={max_staleness} can't be kept")
    if max_staleness == 0:
        return primaries, attempt
    trusted = [replica.peer for replica in primaries]

    async def checked(peer: Any, timeout: float) -> Forwarded:
        if peer in trusted:
            return await attempt(peer, timeout)
        asking = asyncio.ensure_future(fetch_version(shared.node, uid, trusted[0], timeout=timeout))
        try:
            outputs, answer = await attempt(peer, timeout)
            try:
                newest = await asking
            except (TesseractError, TimeoutError) as error:
                raise TooStale(
                    f"how old the answer of a follower of {uid} is, its primary does not say: {describe(error)}"
                ) from error
        finally:
            await cancel_all([asking])
        if answer.version + max_staleness < newest:
            raise TooStale(
                f"a follower of {uid} answered at version {answer.version}, its primary is at {newest}: "
                f"more than max_staleness={max_staleness} steps"
            )
        return outputs, answer

    return replicas, checked
