"""Keeps all pipes of a node, together, to an upload and a download rate; any transport's pipes alike.

A throttled pipe stops reading, or says that it has not drained, until the bytes that passed are paid for. So nothing
is buffered here, and the ordinary backpressure does the rest at both ends.
"""

from __future__ import annotations

import asyncio
from typing import Final

from tesseract_async.transport.base import Pipe, PipeReceiver

from tesseract_async.transport.token_bucket import TokenBucket

SMALL: Final = 4096
"""Pieces up to this size are paid for but do not wait: a heartbeat must not stand behind megabytes."""
MAX_DEBT: Final = 2.0
"""... unless others of them already made a debt of so many seconds."""
MIN_WAIT: Final = 0.002
"""Shorter waits are not worth a timer; their debt stays and adds up."""


class Throttle:
    """What all pipes of a node share: a bucket for each direction, and the bytes that passed. One event loop's."""

    def __init__(self, *, upload_rate: float | None = None, download_rate: float | None = None) -> None:
        """Rates are bytes per second, None for no limit. Raises: ValueError for a rate that is not positive."""
        self._upload = None if upload_rate is None else TokenBucket(upload_rate)
        self._download = None if download_rate is None else TokenBucket(download_rate)
        self.num_bytes_sent = 0
        self.num_bytes_received = 0

    def sent(self, num_bytes: int, now: float) -> float:
        """`num_bytes` were sent at `now` (loop time). Returns the seconds to wait before more."""
        self.num_bytes_sent += num_bytes
        return _wait(self._upload, num_bytes, now)

    def received(self, num_bytes: int, now: float) -> float:
        """`num_bytes` were received at `now` (loop time). Returns the seconds to wait before more."""
        self.num_bytes_received += num_bytes
        return _wait(self._download, num_bytes, now)

    def wrap(self, pipe: Pipe) -> ThrottledPipe:
        """The pipe, kept to the rates."""
        return ThrottledPipe(pipe, self)


def _wait(bucket: TokenBucket | None, num_bytes: int, now: float) -> float:
    if bucket is None:
        return 0.0
    wait = bucket.take(num_bytes, now)
    return 0.0 if wait < MIN_WAIT or (num_bytes <= SMALL and wait < MAX_DEBT) else wait


class ThrottledPipe:
    """See `base.Pipe`; stands between a pipe and its receiver."""

    def __init__(self, pipe: Pipe, throttle: Throttle) -> None:
        self._pipe = pipe
        self._throttle = throttle
        self._loop = asyncio.get_running_loop()
        self._receiver: PipeReceiver | None = None
        self._reading_paused = False
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # what the receiver sees: a pipe

    def start(self, receiver: PipeReceiver) -> None:
        self._receiver = receiver
        self._pipe.start(self)

    def write(self, data: bytes | memoryview) -> None:
        num_bytes = len(data) if isinstance(data, bytes) else data.nbytes
        self._pipe.write(data)
        wait = self._throttle.sent(num_bytes, self._loop.time())
        if wait > 0 and self._receiver is not None:
            if self._write_timer is not None:
                self._write_timer.cancel()
            self._write_timer = self._loop.call_later(wait, self._may_write)

    @property
    def paused(self) -> bool:
        return self._write_timer is not None or self._pipe.paused

    @property
    def unsent(self) -> int:
        return self._pipe.unsent

    def pause_reading(self) -> None:
        self._reading_paused = True
        self._pipe.pause_reading()

    def resume_reading(self) -> None:
        self._reading_paused = False
        if self._read_timer is None:
            self._pipe.resume_reading()

    def close(self) -> None:
        self._pipe.close()

    def abort(self) -> None:
        self._pipe.abort()

    @property
    def description(self) -> str:
        return self._pipe.description

    @property
    def origin(self) -> str:
        return self._pipe.origin

    # what the pipe sees: a receiver

    def get_buffer(self) -> memoryview:
        assert self._receiver is not None
        return self._receiver.get_buffer()

    def buffer_updated(self, count: int) -> None:
        assert self._receiver is not None
        wait = self._throttle.received(count, self._loop.time())
        if wait > 0 and self._read_timer is None:
            self._read_timer = self._loop.call_later(wait, self._may_read)
            self._pipe.pause_reading()
        self._receiver.buffer_updated(count)

    def pipe_drained(self) -> None:
        # else the timer tells, once it is due
        if self._write_timer is None and self._receiver is not None:
            self._receiver.pipe_drained()

    def pipe_lost(self, error: Exception | None) -> None:
        for timer in (self._read_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._read_timer = self._write_timer = None
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.pipe_lost(error)

    def _may_read(self) -> None:
        self._read_timer = None
        if not self._reading_paused:
            self._pipe.resume_reading()

    def _may_write(self) -> None:
        self._write_timer = None
        if self._pipe.paused or self._receiver is None:
            return  # the pipe's own pipe_drained follows
        if self._pipe.unsent:
            # too little waits for the pipe to announce its drain, but drained means that no memory is on loan
            self._write_timer = self._loop.call_later(MIN_WAIT, self._may_write)
            return
        self._receiver.pipe_drained()
