"""``torchrun`` for servers: ``python -m tesseract_async.cli.torchrun``, with all of torchrun's options.

torchrun ends with status 1 whenever a signal tells it to end, even if all of its processes then leave in good order.
Here SIGTERM and Ctrl-C only reach the processes: once all of them have ended by themselves, torchrun finds its work
done, and its status is 0.
"""

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from functools import partial
from types import FrameType
from typing import Final

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import record

POLL_SECONDS: Final = 0.1


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as torchrun does, with these arguments or the command line's."""
    options = run.parse_args(arguments)  # type: ignore[no-untyped-call]
    leaving = {"SIGTERM", "SIGINT"}
    names = (name.strip() for name in options.signals_to_handle.split(","))
    options.signals_to_handle = ",".join(name for name in names if name not in leaving)
    if options.shutdown_timeout is None:
        options.shutdown_timeout = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
    for name in leaving:
        signal.signal(getattr(signal, name), partial(_leave, options.shutdown_timeout))
    record(run.run)(options)


def _leave(patience: float, number: int, frame: FrameType | None) -> None:
    """Let the processes leave; return once all have, which torchrun then notices.

    Raises: SignalException, upon which torchrun gives up: if one fails, if that takes longer than `patience` seconds
    (those that are left are killed), or upon a second signal.
    """

    def give_up(*_: object) -> None:
        raise SignalException(f"told to end by {signal.Signals(number).name}", signal.Signals(number))

    signal.signal(number, give_up)
    pids = [child.pid for child in psutil.Process().children()]
    statuses: dict[int, int] = {}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    until = time.monotonic() + patience
    while len(statuses) < len(pids) and time.monotonic() < until:
        time.sleep(POLL_SECONDS)
        for pid in pids:
            # looks, and takes nothing: torchrun has yet to learn how its processes ended
            if (found := os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                statuses[pid] = found.si_status
    for pid in set(pids) - set(statuses):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # each has a session of its own
    if not pids or len(statuses) < len(pids) or any(statuses.values()):
        give_up()


if __name__ == "__main__":
    main()
