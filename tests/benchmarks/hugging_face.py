"""A mixture model of Transformers whose experts two servers on this computer host, against the same model whole.

All processes have one thread each. The second part lets every call of a layer wait for a made-up round trip; the third
starts one server with 6,144 small experts.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import tesseract_async as ta
from tests.benchmarks.figures import emit, percentile

NUM_LAYERS, NUM_EXPERTS, TOP_K, WIDTH = 4, 32, 8, 1024
PROMPT, NUM_PAIRS = 256, 5


def make(folder: Path, *, width: int = WIDTH, num_layers: int = NUM_LAYERS, num_experts: int = NUM_EXPERTS) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=1024, hidden_size=width, num_hidden_layers=num_layers, num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256), head_dim=64, intermediate_size=width,
        moe_intermediate_size=width // 2, num_experts=num_experts,
        num_experts_per_tok=TOP_K, norm_topk_prob=True, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


@contextlib.contextmanager
def servers(folder: Path) -> Iterator[list[str]]:
    """Two, with half of each layer's experts; their addresses."""
    half, training = NUM_EXPERTS // 2, ["--optimizer", "adamw", "--step", "lockstep"]
    with contextlib.ExitStack() as stack:
        addresses: list[str] = []
        for first in (0, half):
            pattern = f"m.[0:{NUM_LAYERS}].[{first}:{first + half}]"
            peers = ["--initial-peers", addresses[0]] if addresses else []
            addresses.append(stack.enter_context(server(folder, pattern, *training, *peers)))
        yield addresses


@contextlib.contextmanager
def server(folder: Path, pattern: str, *more: str) -> Iterator[str]:
    """Its address."""
    command = [sys.executable, "-m", "tesseract_async", "serve", "--hf-checkpoint", str(folder), "--threads", "1"]
    command += ["--experts", pattern, "--port", "0", *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        found = None
        while found is None:
            line = process.stdout.readline()
            assert line, "a server did not start"
            found = re.search(r"served at ([\d.]+:\d+)", line)
        threading.Thread(target=process.stdout.read, daemon=True).start()  # a full pipe would stop it
        yield found[1]
    finally:
        process.kill()
        process.wait()


def stolen() -> float:
    """Seconds in which the host of this virtual machine ran something else, so far; 0 where that is not told."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path("/proc/stat").read_text().split("\n")[0].split()[8]) / os.sysconf("SC_CLK_TCK")
    return 0.0


def many(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    make(folder, width=64, num_layers=48, num_experts=128)
    began, before, ids = time.perf_counter(), stolen(), torch.arange(1, 9)[None]
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(server(folder, "m.[0:48].[0:128]", "--optimizer", "none"))
        emit("6,144 experts, server up", time.perf_counter() - began, "s", "<= 5", stolen_s=stolen() - before)
        node = stack.enter_context(ta.BackgroundNode(initial_peers=[address]))
        with ta.transformers.remote_experts(node, "m"):
            model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            emit("6,144 experts, first forward", seconds(lambda: model(ids)), "s", "<= 0.5")
            emit("6,144 experts, second forward", seconds(lambda: model(ids)), "s", "")


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def works(model: Any) -> dict[str, Callable[[], object]]:
    """What is measured of a model."""
    ids = torch.randint(3, 1024, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def decode() -> None:
        model.generate(ids[:, :8], max_new_tokens=16, min_new_tokens=16, do_sample=False)

    def prefill() -> None:
        with torch.no_grad():
            model(ids)

    def train() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return {"decode": decode, "prefill": prefill, "training": train}


def delay(model: Any, round_trip: float) -> None:
    """Have each layer's forwards without gradients take longer by that many seconds."""
    from tesseract_async.transformers.remote import remote_layers

    for module in remote_layers(model).values():
        pool = vars(module)["tesseract_layer"].pool
        answer = type(pool).answer.__get__(pool)

        def later(*args: Any, answer: Any = answer) -> torch.Tensor:
            time.sleep(round_trip)
            found: torch.Tensor = answer(*args)
            return found

        pool.answer = later


def main() -> None:
    from transformers import AutoModelForCausalLM, utils

    utils.logging.disable_progress_bar()
    utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        whole = AutoModelForCausalLM.from_pretrained(folder)
        with servers(Path(folder)) as peers, ta.BackgroundNode(initial_peers=peers) as node:
            with ta.transformers.remote_experts(node, "m"):
                remote = AutoModelForCausalLM.from_pretrained(folder)
            ours, local = works(remote), works(whole)
            for name, least in (("decode", 0.9), ("prefill", 0.6), ("training", 0.75)):
                pairs = [(seconds(local[name]), seconds(ours[name])) for _ in range(NUM_PAIRS + 1)][1:]
                share = percentile([x / y for x, y in pairs], 0.5)
                emit(f"{name}, share of local", share, "", f">= {least:g}", local_ms=pairs[-1][0] * 1e3)
            alone = min(seconds(local["decode"]) for _ in range(3)) / 16
            for round_trip in (0.005, 0.05):
                delay(remote, round_trip)
                before = stolen()
                took = min(seconds(ours["decode"]) for _ in range(2)) / 16
                share = (alone + NUM_LAYERS * round_trip) / took
                name = f"decode at {round_trip * 1e3:g} ms, share of what waiting allows"
                emit(name, share, "", ">= 0.8", stolen_s=stolen() - before)
        many(Path(folder) / "many")


if __name__ == "__main__":
    main()
