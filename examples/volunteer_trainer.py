"""Train a mixture of experts that others host (start `volunteer_server.py` first, here or on another computer).

    python examples/volunteer_trainer.py --initial-peers 127.0.0.1:31337

The model learns to reverse its input vectors: only the mixture's experts and this trainer's gate learn.
"""

import argparse

import torch
from torch.nn import functional as F

import tesseract_async as ta


async def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    async with ta.TesseractNode(args.host, initial_peers=args.initial_peers) as node:
        gate = ta.GatingFunction(
            node, uid_prefix="ffn", grid_size=tuple(args.grid_size), in_features=args.width, k_best=args.k_best
        )
        optimizer = torch.optim.Adam(gate.parameters(), lr=args.learning_rate)
        for step in range(1, args.steps + 1):
            x = torch.randn(args.rows, args.width)
            loss = F.mse_loss(await gate(x), x.flip(1))
            optimizer.zero_grad()
            await ta.backward(loss)  # the experts step on their servers, ...
            optimizer.step()  # ... and the gate steps here
            if step % 10 == 0 or step == args.steps:
                print(f"step {step}: loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--initial-peers", nargs="+", required=True, metavar="HOST:PORT")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 if the peers are on other computers")
    parser.add_argument("--grid-size", type=int, nargs="+", default=[4, 4])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--k-best", type=int, default=2)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    try:
        ta.run(main(parser.parse_args()))
    except (OSError, ValueError, ta.errors.TesseractError) as error:  # such as no answer: a sentence is enough
        raise SystemExit(f"{parser.prog}: {error}") from None
