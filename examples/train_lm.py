"""A small language model, trained by all who start this program: experts and everything else are one model's.

    python examples/train_lm.py --text input.txt        # in one terminal, then in as many more as you like

The first one starts a swarm and hosts the experts; the others find it at the same port and join. Each trains on
samples of its own, and one model comes out. Without --text it reads the Python standard library's sources, as bytes.
Ctrl-C stops cleanly; the first one goes on where it was, started again. --initial-peers joins a swarm elsewhere.
"""

import argparse
import asyncio
import contextlib
import math
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import tesseract_async as ta
from tesseract_async.leaving import told_to_leave
from tesseract_async.monitoring import publish_progress

HEADS = 4


def read_text(path: str | None, max_bytes: int) -> torch.Tensor:
    """Return the bytes of the file, or of the standard library's modules, as tokens."""
    if path is not None:
        raw = Path(path).read_bytes()[:max_bytes]
    else:
        sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        raw = b"\n".join(source.read_bytes() for source in sources)[:max_bytes]
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()


def sample(tokens: torch.Tensor, args: argparse.Namespace, generator: torch.Generator) -> list[torch.Tensor]:
    """Return random windows, and the same shifted by one token: ``[batch, length]`` each."""
    starts = torch.randint(len(tokens) - args.length - 1, (args.batch_size,), generator=generator)
    windows = torch.stack([tokens[start : start + args.length + 1] for start in starts.tolist()])
    return [windows[:, :-1], windows[:, 1:]]


def feed_forward(width: int) -> nn.Module:
    """One expert: a transformer's feed-forward layer, with tokens as rows."""
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Block(nn.Module):
    """Attention, then a mixture of experts."""

    def __init__(self, width: int, mixture: nn.Module) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mixture_norm, self.mixture = nn.LayerNorm(width), mixture

    async def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y: torch.Tensor = await self.mixture(self.mixture_norm(x))
        return x + y


class Transformer(nn.Module):
    """Tokens to logits."""

    def __init__(self, mixtures: Sequence[nn.Module], args: argparse.Namespace) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, args.width), nn.Embedding(args.length, args.width)
        self.blocks = nn.ModuleList(Block(args.width, mixture) for mixture in mixtures)
        self.norm, self.head = nn.LayerNorm(args.width), nn.Linear(args.width, 256)

    async def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = await block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


async def loss_of(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy per token, in nats."""
    tokens, targets = batch
    return F.cross_entropy((await model(tokens)).flatten(0, 1), targets.flatten())


async def join(stack: contextlib.AsyncExitStack, args: argparse.Namespace) -> tuple[ta.TesseractNode, bool]:
    """Return a node, and whether it is the swarm's first: the one that has the port."""
    peers = args.initial_peers
    if not peers:
        with contextlib.suppress(OSError):
            return await stack.enter_async_context(ta.TesseractNode(args.host, args.port)), True
        peers = [f"127.0.0.1:{args.port}"]
    return await stack.enter_async_context(ta.TesseractNode(args.host, initial_peers=peers)), False


def make_experts(args: argparse.Namespace) -> dict[str, nn.Module]:
    """All experts by uid; equal seeds give equal ones."""
    torch.manual_seed(args.seed)
    cells = [(i, a, b) for i in range(args.layers) for a in range(args.grid) for b in range(args.grid)]
    return {f"layer{i}.{a}.{b}": feed_forward(args.width) for i, a, b in cells}


def hosted(node: ta.TesseractNode, args: argparse.Namespace) -> ta.TesseractServer:
    """All experts, each with an optimizer of its own."""
    experts = {
        uid: ta.ExpertBackend(
            module,
            optimizer=torch.optim.Adam(module.parameters(), args.lr),
            args_schema=(ta.TensorSpec((args.width,)),),
            max_batch_size=4 * args.batch_size * args.length,
        )
        for uid, module in make_experts(args).items()
    }
    return ta.TesseractServer(node, experts, checkpoint_dir=Path(args.out) / "experts")


async def show(
    node: ta.TesseractNode, shared: ta.SharedParameters[Transformer], loss: float, held_out: list[torch.Tensor]
) -> None:
    """Show observers the loss here, and that of the parameters that all trainers share."""
    with torch.no_grad():
        merged = await loss_of(shared.merged(), held_out)
    await publish_progress(node, "layer0", step=shared.steps, loss=loss)
    await publish_progress(node, "layer0", step=shared.steps, loss=merged.item(), trainer="merged")


async def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    tokens = read_text(args.text, args.max_bytes)
    held_out = len(tokens) // 10
    if held_out < args.length + 2:
        raise ValueError(f"the text has {len(tokens)} bytes, of which a tenth is shorter than --length")
    stop, started, seen = asyncio.Event(), time.perf_counter(), 0
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(told_to_leave(asyncio.get_running_loop(), lambda _: stop.set()))
        node, is_first = await join(stack, args)
        if is_first:
            await stack.enter_async_context(hosted(node, args))
        torch.manual_seed(args.seed + 1)
        grid = {"grid_size": (args.grid, args.grid), "in_features": args.width, "k_best": args.k_best}
        mixtures = [ta.GatingFunction(node, uid_prefix=f"layer{i}", route="token", **grid) for i in range(args.layers)]
        model = Transformer(mixtures, args)
        optimizer = torch.optim.Adam(model.parameters(), args.lr)
        kept = Path(args.out) / "shared" if is_first else None
        shared = ta.SharedParameters(node, model, run="train-lm", every=args.every, checkpoint_dir=kept)
        steps = (await stack.enter_async_context(shared)).steps
        print(f"goes on after step {steps}; others join with --initial-peers {node.address}", flush=True)
        # every trainer has samples of its own, which are others each time
        draw = torch.Generator().manual_seed(args.seed + 1_000_000 * steps if is_first else torch.seed() % 2**31)
        while steps < args.steps and not stop.is_set():
            loss = await loss_of(model, sample(tokens[:-held_out], args, draw))
            optimizer.zero_grad()
            await ta.backward(loss)
            optimizer.step()
            await shared.step()
            before, steps = steps, shared.steps
            if steps // args.report_every > before // args.report_every:
                print(f"step {steps}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)
                await show(node, shared, loss.item(), sample(tokens[-held_out:], args, draw))
        while seen < shared.steps and not (seen and stop.is_set()):  # the others' last steps count, too
            seen = shared.steps
            await shared.flush()
            await asyncio.sleep(3.0)
            await shared.flush()
        model = shared.merged()  # what all trainers have made together
        draw.manual_seed(1)
        with torch.no_grad():
            losses = [await loss_of(model, sample(tokens[-held_out:], args, draw)) for _ in range(args.eval_batches)]
        reached = math.exp(sum(loss.item() for loss in losses) / len(losses))
        print(f"perplexity after {shared.steps} steps: {reached:.3f} per byte", flush=True)
        while is_first and node.endpoint.connections() and not stop.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.5)  # others still need the experts that are hosted here


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", help="a text file; the standard library's sources if not given")
    add("--initial-peers", nargs="*", default=[], help="a swarm to join; else the one of this computer")
    add("--host", default="127.0.0.1", help="0.0.0.0 if the others are on other computers")
    add("--out", default="train_lm", help="folder for what the first one needs to go on")
    add("--steps", type=int, default=500, help="of all trainers together")
    numbers = {"port": 31415, "seed": 0, "every": 16, "layers": 2, "grid": 4, "k-best": 2, "width": 64, "length": 64}
    numbers |= {"batch-size": 16, "report-every": 50, "eval-batches": 16, "max-bytes": 2_000_000}
    for name, value in numbers.items():
        add(f"--{name}", type=int, default=value)
    add("--lr", type=float, default=2e-3)
    return parser.parse_args()


if __name__ == "__main__":
    try:
        asyncio.run(main(parse()))
    except (OSError, ValueError, ta.errors.TesseractError) as error:  # no such text, say: a sentence is enough
        raise SystemExit(f"train_lm.py: {error}") from None
