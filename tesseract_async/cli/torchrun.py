"""``torchrun`` for servers: ``python -m tesseract_async.cli.torchrun``, with all of torchrun's options.

torchrun ends with status 1 whenever a signal tells it to end, even if all of its processes then leave in good order.
Here SIGTERM and Ctrl-C only reach the processes: once all of them have ended by themselves, torchrun finds its work
done, and its status is 0.

torchrun's store accepts data from anybody, on all interfaces, and torchrun unpickles some of it. Here, with
``--standalone``, only this machine reaches the store and gloo.
"""

import argparse
import contextlib
import os
import signal
import socket
import time
import uuid
from collections.abc import Sequence
from functools import partial
from types import FrameType
from typing import Final

import psutil
from torch._C._distributed_c10d import TCPStore
from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

POLL_SECONDS: Final = 0.1
LOCAL: Final = "127.0.0.1"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as torchrun does, with these arguments or the command line's."""
    options = run.parse_args(arguments)  # type: ignore[no-untyped-call]
    leaving = {"SIGTERM", "SIGINT"}
    names = (name.strip() for name in options.signals_to_handle.split(","))
    options.signals_to_handle = ",".join(name for name in names if name not in leaving)
    if options.shutdown_timeout is None:
        options.shutdown_timeout = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
    if options.standalone:
        _stay_local(options)
    for name in leaving:
        signal.signal(getattr(signal, name), partial(_leave, options.shutdown_timeout))
    record(run.run)(options)


def _stay_local(options: argparse.Namespace) -> None:
    """Let the processes of this machine meet at an address that no other machine reaches."""
    rendezvous_handler_registry.register(_LocalBackend.name, _make_local_handler)
    options.standalone, options.rdzv_backend, options.rdzv_endpoint = False, _LocalBackend.name, f"{LOCAL}:0"
    options.rdzv_id, options.local_addr = str(uuid.uuid4()), LOCAL
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == LOCAL for one in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


class _LocalBackend(C10dRendezvousBackend):
    name = "local"


def _make_local_handler(params: RendezvousParameters) -> RendezvousHandler:
    with socket.create_server((LOCAL, 0)) as one:
        port = one.getsockname()[1]
        store = TCPStore(
            LOCAL, port, is_master=True, wait_for_workers=False, multi_tenant=True, master_listen_fd=one.detach()
        )
    handler = create_handler(store, _LocalBackend(store, params.run_id), params)
    handler._create_tcp_store_server = lambda *_: store  # type: ignore[method-assign]  # else on all interfaces
    return handler


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
