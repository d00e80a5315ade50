"""A small language model whose feed-forward layers are mixtures of remote experts.

By default it reads the Python standard library's own sources, byte by byte; --text takes any text file, such as
Shakespeare. The experts live in this process unless --initial-peers says where they are hosted. --local trains the
same model without a network, --compare one after the other. Ctrl-C stops it cleanly; the same command resumes
it.

    python examples/train_lm.py --text input.txt --steps 500
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import tesseract_async as ta
from tesseract_async.leaving import told_to_leave

# ------------------------------------------------------------------------------------------------ data


def read_text(path: str | None, max_bytes: int) -> torch.Tensor:
    """Return the bytes of the file, or of the standard library's modules, as tokens."""
    if path is not None:
        raw = Path(path).read_bytes()[:max_bytes]
    else:
        sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        raw = b"\n".join(source.read_bytes() for source in sources)[:max_bytes]
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()


def sample(
    tokens: torch.Tensor, args: argparse.Namespace, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random windows, and the same shifted by one token: ``[batch, length]`` each."""
    starts = torch.randint(len(tokens) - args.length - 1, (args.batch_size,), generator=generator)
    windows = torch.stack([tokens[start : start + args.length + 1] for start in starts.tolist()])
    return windows[:, :-1], windows[:, 1:]


# ------------------------------------------------------------------------------------------------ model


class FeedForward(nn.Module):
    """One expert: a transformer's feed-forward layer, with tokens as rows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out(F.gelu(self.into(x)))
        return result


class LocalMixture(nn.Module):
    """The same mixture as `GatingFunction`, with the experts at hand: what the remote one is compared with."""

    def __init__(self, experts: list[nn.Module], width: int, grid: int, k_best: int) -> None:
        super().__init__()
        self.experts, self.grid, self.k_best = nn.ModuleList(experts), grid, k_best
        self.proj = nn.Linear(width, 2 * grid)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        first, second = self.proj(rows).split(self.grid, dim=1)
        scores, best = (first[:, :, None] + second[:, None, :]).flatten(1).topk(self.k_best, dim=1)
        weights = scores.softmax(1)
        out = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            at, rank = (best == index).nonzero(as_tuple=True)
            if len(at):
                out = out.index_add(0, at, weights[at, rank, None] * expert(rows[at]))
        return out.reshape(x.shape)


class Block(nn.Module):
    """Attention, then the mixture."""

    def __init__(self, width: int, num_heads: int, mixture: nn.Module) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mixture_norm, self.mixture = nn.LayerNorm(width), mixture

    async def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, length, width = x.shape
        heads = self.qkv(self.norm(x)).view(b, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, length, width))
        y = self.mixture(self.mixture_norm(x))
        return x + (y if isinstance(y, torch.Tensor) else await y)


class Transformer(nn.Module):
    """Tokens to logits."""

    def __init__(self, mixtures: list[nn.Module], args: argparse.Namespace) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, args.width), nn.Embedding(args.length, args.width)
        self.blocks = nn.ModuleList(Block(args.width, args.num_heads, mixture) for mixture in mixtures)
        self.norm, self.head = nn.LayerNorm(args.width), nn.Linear(args.width, 256)

    async def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = await block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


async def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy per token, in nats."""
    tokens, targets = batch
    return F.cross_entropy((await model(tokens)).flatten(0, 1), targets.flatten())


# ------------------------------------------------------------------------------------------------ training


def make_experts(args: argparse.Namespace) -> dict[str, nn.Module]:
    """Return all experts by uid; equal seeds give equal experts."""
    torch.manual_seed(args.seed)
    cells = [(i, a, b) for i in range(args.layers) for a in range(args.grid) for b in range(args.grid)]
    return {f"layer{i}.{a}.{b}": FeedForward(args.width) for i, a, b in cells}


def backends(experts: dict[str, nn.Module], args: argparse.Namespace) -> dict[str, ta.ExpertBackend]:
    """The experts as a server hosts them, each with its own optimizer."""
    spec = ta.TensorSpec((args.width,))
    rows = args.batch_size * args.length
    return {
        uid: ta.ExpertBackend(
            module, optimizer=torch.optim.Adam(module.parameters(), args.lr), args_schema=(spec,), max_batch_size=rows
        )
        for uid, module in experts.items()
    }


async def train(
    args: argparse.Namespace, out: Path, model: nn.Module, optimizers: list[Any], stop: asyncio.Event
) -> float:
    """Train, saving on the way, and return the perplexity; `optimizers` step local parameters (remote experts step
    themselves)."""
    tokens = read_text(args.text, args.max_bytes)
    split = int(0.9 * len(tokens))
    if len(tokens) - split < args.length + 2:
        raise ValueError(f"the text has {len(tokens)} bytes, of which a tenth is shorter than --length")
    train_tokens, valid_tokens = tokens[:split], tokens[split:]
    saved = out / "trainer.pt"
    step = 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        try:
            model.load_state_dict(state["model"])
            for optimizer, theirs in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(theirs)
        except (RuntimeError, ValueError, KeyError):
            raise ValueError(f"{saved} is of a model of other sizes: give those, or another --out") from None
        step = state["step"]
        print(f"goes on after step {step}")

    def save() -> None:
        out.mkdir(parents=True, exist_ok=True)
        state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step}
        torch.save(state, saved.with_suffix(".new"))
        saved.with_suffix(".new").replace(saved)

    async def perplexity() -> float:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            losses = [await loss_of(model, sample(valid_tokens, args, generator)) for _ in range(args.eval_batches)]
        return math.exp(sum(loss.item() for loss in losses) / len(losses))

    started = time.perf_counter()
    try:
        while step < args.steps and not stop.is_set():
            batch = sample(train_tokens, args, torch.Generator().manual_seed(1_000_000 * args.seed + step))
            loss = await loss_of(model, batch)
            await ta.backward(loss)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            if step % args.report_every == 0:
                print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)
        reached = await perplexity()
        print(f"perplexity after {step} steps: {reached:.3f} per byte", flush=True)
        return reached
    finally:
        save()


async def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    stop = asyncio.Event()
    with told_to_leave(asyncio.get_running_loop(), lambda _: stop.set()):
        await run_all(args, stop)


async def run_all(args: argparse.Namespace, stop: asyncio.Event) -> None:
    read_text(args.text, 1)  # before anything is trained or written
    out = Path(args.out)
    if not args.compare:
        await run(args, out, stop, local=args.local)
        return
    print("the same model at hand:")
    local = await run(args, out / "local", stop, local=True)
    if stop.is_set():
        return
    print("with remote experts:")
    remote = await run(args, out / "remote", stop, local=False)
    if not stop.is_set():
        print(f"perplexity: local {local:.3f}, remote {remote:.3f}, remote / local {remote / local:.4f}")


async def run(args: argparse.Namespace, out: Path, stop: asyncio.Event, *, local: bool) -> float:
    """Train one model, with local (`local`) or remote experts; return its perplexity."""
    experts = make_experts(args)
    async with contextlib.AsyncExitStack() as stack:
        optimizers: list[Any] = []
        if local:
            size = args.grid**2
            by_layer = [list(experts.values())[i * size : (i + 1) * size] for i in range(args.layers)]
            torch.manual_seed(args.seed + 1)
            mixtures: list[nn.Module] = [LocalMixture(e, args.width, args.grid, args.k_best) for e in by_layer]
            optimizers += [torch.optim.Adam(expert.parameters(), args.lr) for expert in experts.values()]
        else:
            node = await stack.enter_async_context(ta.TesseractNode(args.host, initial_peers=args.initial_peers))
            if not args.initial_peers:
                checkpoints = out / "experts"
                server = ta.TesseractServer(node, backends(experts, args), checkpoint_dir=checkpoints)
                await stack.enter_async_context(server)
            torch.manual_seed(args.seed + 1)
            mixtures = [
                ta.GatingFunction(
                    node,
                    uid_prefix=f"layer{i}",
                    grid_size=(args.grid, args.grid),
                    in_features=args.width,
                    k_best=args.k_best,
                    route="token",
                )
                for i in range(args.layers)
            ]
        model = Transformer(mixtures, args)
        remote = {id(p) for expert in experts.values() for p in expert.parameters()}
        optimizers.append(torch.optim.Adam([p for p in model.parameters() if id(p) not in remote], args.lr))
        return await train(args, out, model, optimizers, stop)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", help="a text file; the standard library's sources if not given")
    add("--max-bytes", type=int, default=2_000_000)
    add("--initial-peers", nargs="*", default=[], help="where the experts are hosted; here if not given")
    add("--host", default="127.0.0.1", help="0.0.0.0 if the peers are on other computers")
    add("--local", action="store_true", help="the same model without a network")
    add("--compare", action="store_true", help="first without, then with remote experts")
    add("--out", default="train_lm", help="folder for what is needed to go on")
    add("--steps", type=int, default=500)
    add("--seed", type=int, default=0)
    add("--layers", type=int, default=2)
    add("--grid", type=int, default=4, help="experts are a grid of this size, squared, in each layer")
    add("--k-best", type=int, default=2)
    add("--width", type=int, default=64)
    add("--num-heads", type=int, default=4)
    add("--length", type=int, default=64)
    add("--batch-size", type=int, default=16)
    add("--lr", type=float, default=2e-3)
    add("--threads", type=int, default=1)
    add("--report-every", type=int, default=50)
    add("--eval-batches", type=int, default=16)
    return parser.parse_args()


if __name__ == "__main__":
    try:
        asyncio.run(main(parse()))
    except (OSError, ValueError, ta.errors.TesseractError) as error:  # no such text, say: a sentence is enough
        raise SystemExit(f"train_lm.py: {error}") from None
