"""Lend this computer to a training run: host some experts, and keep their weights.

    python examples/volunteer_server.py
    python examples/volunteer_server.py --host 0.0.0.0 --port 31337 --public      (for other computers)
    python examples/volunteer_server.py --initial-peers 127.0.0.1:31337 --experts 'ffn.[2:4].[0:4]'

The first node prints the address that all others, servers and trainers, take as ``--initial-peers``. These are the 30
lines of `tesseract serve` that matter, for hosting your own expert.
"""

import argparse
import asyncio

import torch

import tesseract_async as ta
from tesseract_async.experts.pattern import ExpertPattern


def make_expert(width: int, learning_rate: float) -> ta.ExpertBackend:
    """Any module that maps rows to rows will do."""
    module = torch.nn.Sequential(torch.nn.Linear(width, 4 * width), torch.nn.ReLU(), torch.nn.Linear(4 * width, width))
    optimizer = torch.optim.Adam(module.parameters(), lr=learning_rate)
    return ta.ExpertBackend(module, optimizer=optimizer, args_schema=(ta.TensorSpec((width,)),))


async def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    experts = {uid: make_expert(args.width, args.learning_rate) for uid in ExpertPattern.parse(args.experts)}
    async with (
        ta.TesseractNode(args.host, args.port, initial_peers=args.initial_peers, public=args.public) as node,
        ta.TesseractServer(node, experts, device=args.device, checkpoint_dir=args.checkpoint_dir),
    ):
        print(f"{len(experts)} experts are ready; others join with --initial-peers {node.peer_address}", flush=True)
        await asyncio.Event().wait()  # until Ctrl-C or SIGTERM: leaving the block withdraws the experts and saves them


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--public", action="store_true", help="this is the first node of a swarm beyond one computer")
    parser.add_argument("--initial-peers", nargs="*", default=[], metavar="HOST:PORT")
    parser.add_argument("--experts", default="ffn.[0:2].[0:4]", help="uids to host")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint-dir", default=None, help="where weights are kept, to go on from after a restart")
    try:
        ta.run(main(parser.parse_args()))  # asyncio.run that also leaves cleanly on SIGTERM and SIGHUP
    except (OSError, ValueError, ta.errors.TesseractError) as error:  # a port in use, say: a sentence is enough
        raise SystemExit(f"{parser.prog}: {error}") from None
