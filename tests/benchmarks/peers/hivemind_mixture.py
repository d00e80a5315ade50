"""hivemind's side of the mixture load (`loads.MixtureLoad`): its RemoteMixtureOfExperts on the same grid and batch.

It sends one request per row and expert, so the whole batch takes most of a minute on two cores: `--rows` takes part of
the batch, and the figure is rows/s either way. The rows go in slices of `--slice`, because a larger batch's gate scores
(over 16 KiB) often break the pipe to hivemind's DHT process for good (`BlockingIOError` in `DHT.run`, then silence).
A slice of 24 rows keeps 96 requests in flight. Where whole batches got through, they ran at the same rows/s.
"""

import argparse
import time
from multiprocessing.connection import Connection

import hivemind
import torch
from hivemind.utils.tensor_descr import BatchTensorDescriptor

from tests.benchmarks.figures import emit
from tests.benchmarks.loads import MixtureLoad
from tests.benchmarks.modules import KINDS
from tests.benchmarks.processes import child, wait_for_stop

NUM_HANDLERS = 2


def serve(pipe: Connection, load: MixtureLoad) -> None:
    """One server process with all live experts of the grid."""
    torch.set_num_threads(1)
    dht = hivemind.DHT(start=True)
    backends = {
        uid: hivemind.ModuleBackend(
            name=uid,
            module=KINDS["nop"](load.width),
            args_schema=(BatchTensorDescriptor(load.width),),
            outputs_schema=BatchTensorDescriptor(load.width),
            max_batch_size=8192,
        )
        for uid in load.uids()
    }
    server = hivemind.Server(dht, backends, num_connection_handlers=NUM_HANDLERS, device="cpu")
    server.run_in_background(await_ready=True)
    pipe.send(("value", [str(address) for address in dht.get_visible_maddrs()]))
    wait_for_stop(pipe)
    server.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="rows of the batch that are sent")
    parser.add_argument("--slice", type=int, default=24, help="rows of one call")
    args = parser.parse_args()
    rows = args.rows
    load = MixtureLoad()
    with child(serve, (load,)) as server:
        addresses = server.receive(120)
        torch.set_num_threads(1)
        torch.manual_seed(load.seed)
        dht = hivemind.DHT(initial_peers=addresses, client_mode=True, start=True)
        mixture = hivemind.RemoteMixtureOfExperts(
            in_features=load.width, grid_size=load.grid_size, dht=dht, uid_prefix="ffn.", k_best=load.k_best
        )
        give_up = time.monotonic() + 30
        while any(expert is None for expert in hivemind.moe.get_experts(dht, load.uids())):
            if time.monotonic() > give_up:
                raise TimeoutError("the experts were not declared")
            time.sleep(0.2)
        batch = torch.randn(load.rows, load.width)
        with torch.no_grad():
            mixture(batch[:8])  # connections, and the DHT's cache
            begin = time.perf_counter()
            for part in batch[:rows].split(args.slice):
                mixture(part)
            seconds = time.perf_counter() - begin
        emit("mixture 2048x1024, 64x64 grid", rows / seconds, "rows/s", rows=rows, slice=args.slice, seconds=seconds)
        dht.shutdown()


if __name__ == "__main__":
    main()
