"""Hugging Face Accelerate's plain training loop over remote experts: nothing in it knows that they are remote.

    pip install accelerate
    python examples/accelerate_loop.py

The experts live in this process unless --initial-peers says where they are hosted (as layer "ffn", a grid of 2 x 2).
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tesseract_async as ta

WIDTH = 16


class Classifier(nn.Module):
    """A local layer, the mixture, a local layer. With a `BackgroundNode` a gate is called like any module."""

    def __init__(self, node: ta.BackgroundNode) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(2, WIDTH), nn.Linear(WIDTH, 2)
        self.mixture = ta.GatingFunction(node, uid_prefix="ffn", grid_size=(2, 2), in_features=WIDTH, k_best=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.into(x))
        logits: torch.Tensor = self.out(h + self.mixture(h))
        return logits


def make_experts() -> dict[str, ta.ExpertBackend]:
    """Return four small experts, each with its own optimizer."""
    experts = {}
    for uid in (f"ffn.{i}.{j}" for i in range(2) for j in range(2)):
        module = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, WIDTH))
        adam = torch.optim.Adam(module.parameters(), 1e-2)
        experts[uid] = ta.ExpertBackend(module, optimizer=adam, args_schema=(ta.TensorSpec((WIDTH,)),))
    return experts


def two_moons(num_rows: int) -> TensorDataset:
    """Return two interlocking half circles, which no line separates."""
    label = torch.arange(num_rows) % 2
    angle = torch.rand(num_rows) * torch.pi
    x = torch.stack([angle.cos() + label, angle.sin() * (1 - 2 * label) + 0.5 * label], dim=1)
    return TensorDataset(x + 0.1 * torch.randn_like(x), label)


def train(node: ta.BackgroundNode, args: argparse.Namespace) -> float:
    """Train with Accelerate's loop from its manual. Returns the final accuracy."""
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=args.grad_steps, mixed_precision=args.mixed_precision
    )
    model = Classifier(node)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.5)
    data = DataLoader(two_moons(512), batch_size=64, shuffle=True)
    model, optimizer, data, scheduler = accelerator.prepare(model, optimizer, data, scheduler)
    for epoch in range(args.epochs):
        for x, label in data:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), label)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)
    x, label = two_moons(512)[:]
    model.eval()
    with torch.no_grad():
        return (model(x).argmax(1) == label).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--initial-peers", nargs="*", default=[], help="where the experts are hosted; here if not given"
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 if the peers are on other computers")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--grad-steps", type=int, default=1, help="batches whose gradients make one local step")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no")
    args = parser.parse_args()
    torch.manual_seed(0)
    with ta.BackgroundNode(args.host, initial_peers=args.initial_peers) as node:
        if args.initial_peers:
            accuracy = train(node, args)
        else:
            with node.entered(ta.TesseractServer(node.node, make_experts())):
                accuracy = train(node, args)
    print(f"accuracy: {accuracy:.3f}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # everything was closed on the way here
        raise SystemExit(130) from None
    except (OSError, ValueError, ta.errors.TesseractError) as error:  # such as no answer: a sentence is enough
        raise SystemExit(f"accelerate_loop.py: {error}") from None
