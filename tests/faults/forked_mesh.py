"""`tesseract serve --shard` over processes that are forked, and started again as torchrun does, at a tenth of its cost.

``python -m tests.faults.forked_mesh SIZE OPTIONS...``: prints the pids of each life as a line of JSON, among the lines
of the server itself. SIGTERM goes to the processes, and is the end.
"""

import json
import os
import signal
import sys
import warnings

import torch

import tesseract_async.runtime.mesh  # noqa: F401  loaded once
from tesseract_async.cli.main import main as tesseract
from tests.runtime.mesh_jobs import launch, make_store


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    size, options, port = int(sys.argv[1]), sys.argv[2:], make_store()
    told: list[int] = []
    pids: list[int] = []

    def leave(number: int, _: object) -> None:
        told.append(number)
        for pid in pids:
            os.kill(pid, number)

    def serve() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        tesseract(["serve", "--shard", "fsdp", *options])

    signal.signal(signal.SIGTERM, leave)
    while not told:
        pids[:] = launch(range(size), size, serve, port)
        print(json.dumps({"pids": pids}), flush=True)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps({"statuses": statuses}), flush=True)
    sys.exit(max(map(abs, statuses)))


if __name__ == "__main__":
    main()
