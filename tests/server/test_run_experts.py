"""From a manifest to experts: the same everywhere, nothing that the volunteer did not allow."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.errors import SchemaMismatch
from tesseract_async.experts.run import RunManifest, RunMismatch
from tesseract_async.server.run_experts import SCHEDULES, build_run_backend, build_run_module, check_allowed, complete
from tesseract_async.wire.tensors import TensorSpec

DIGITS = RunManifest(
    name="digits",
    prefix="ffn",
    grid_size=(2, 2),
    expert="ffn",
    sizes={"in_features": 8, "hidden_features": 16},
    optimizer="adam",
    optimizer_options={"learning_rate": 0.01, "beta1": 0.0, "amsgrad": True},
    training={"max_batch_size": 32},
    seed=3,
)
OWN = dataclasses.replace(DIGITS, expert=f"{__name__}:own_expert", sizes={"width": 4})


@ta.expert_builder
def own_expert(width: int) -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Linear(width, width), (TensorSpec((width,)),)


def test_a_completed_manifest_knows_its_schemas_and_builds_its_experts() -> None:
    run = complete(DIGITS)
    assert run.args_schema == [["t", ["s", "float32", [8]]]] or run.args_schema == ["t", ["s", "float32", [8]]]
    assert run.outputs_schema == ["s", "float32", [8]]
    backend = build_run_backend(run, "ffn.1.0")
    assert backend.max_batch_size == 32
    assert backend.trains and backend.optimizer is None, "importing an optimizer takes a second: not before it is found"
    backend.prepare()
    assert isinstance(backend.optimizer, torch.optim.Adam)
    (group,) = backend.optimizer.param_groups
    assert (group["lr"], group["betas"], group["amsgrad"]) == (0.01, (0.0, 0.999), True)


def test_equal_wherever_it_is_built_and_another_for_each_uid() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (build_run_module(DIGITS, uid).state_dict() for uid in ("ffn.0.0", "ffn.0.0", "ffn.0.1"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_schedule_and_how_steps_are_taken_come_from_the_run() -> None:
    run = dataclasses.replace(
        DIGITS,
        schedule="linear",
        schedule_options={"num_warmup_steps": 4, "num_steps": 8},
        training={"step_every": 2, "clip_gradient_norm": 1.0, "trim_peers": 0.25},
    )
    backend = build_run_backend(complete(run), "ffn.0.0")
    backend.prepare()
    assert (backend.settings.step_every, backend.settings.clip_gradient_norm) == (2, 1.0)
    assert backend.settings.trim_peers == 0.25
    assert backend.optimizer is not None and backend.scheduler is not None
    rates = []
    for _ in range(9):
        rates.append(backend.optimizer.param_groups[0]["lr"] / 0.01)
        backend.optimizer.step()
        backend.scheduler.step()
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])


def test_the_codecs_of_each_direction_come_from_the_run() -> None:
    run = complete(dataclasses.replace(DIGITS, codecs={"inputs": "bf16", "gradients": "uint8_blockwise"}))
    codecs = build_run_backend(run, "ffn.0.0").settings.codecs
    codecs.check("inputs", "bf16", expert="ffn.0.0")
    codecs.check("gradients", "uint8_blockwise", expert="ffn.0.0")
    codecs.check("outputs", "none", expert="ffn.0.0")
    for what, codec in (("inputs", "none"), ("inputs", "fp16"), ("gradients", "bf16")):
        with pytest.raises(SchemaMismatch, match="ffn.0.0"):
            codecs.check(what, codec, expert="ffn.0.0")


def test_a_cosine_falls_to_its_least() -> None:
    factor = SCHEDULES["cosine"](num_steps=100, num_warmup_steps=10, least=0.1)
    assert [factor(9), factor(10), factor(55), factor(100), factor(1000)] == pytest.approx([1.0, 1.0, 0.55, 0.1, 0.1])


def test_frozen_experts_have_no_optimizer() -> None:
    run = complete(dataclasses.replace(DIGITS, optimizer=None, optimizer_options={}))
    assert not build_run_backend(run, "ffn.0.0").trains


def test_other_schemas_than_the_runs_are_refused_with_both() -> None:
    run = dataclasses.replace(complete(DIGITS), outputs_schema=["s", "float32", [9]])
    with pytest.raises(RunMismatch, match=r"outputs_schema is \['s', 'float32', \[9\]\] in the run, but .*\[8\]"):
        build_run_backend(run, "ffn.0.0")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"expert": "fnn"}, "called 'fnn', which this version does not have"),
        ({"sizes": {"width": 8}}, "ffn takes no size width; it takes in_features, hidden_features, out_features"),
        ({"sizes": {"in_features": -1}}, "in_features is a whole number of 1 or more, not -1"),
        ({"sizes": {"in_features": "8"}}, "in_features is a whole number, not '8'"),
        ({"sizes": {"in_features": 8.0}}, "in_features is a whole number, not 8.0"),
        ({"sizes": {"in_features": True}}, "in_features is a whole number, not True"),
        ({"sizes": {"seed": 8}}, "takes no size seed"),
        ({"optimizer_options": {"fused": False}}, "does not take its options: fused"),
        ({"optimizer_options": {"eps": "x"}}, "does not take its options: eps"),
        ({"optimizer": "lion"}, "no optimizer named 'lion'"),
        ({"optimizer_options": {"speed": 3}}, "does not take its options"),
        ({"optimizer_options": {"learning_rate": -1.0}}, "does not take its options"),
        ({"schedule": "moon"}, "'moon'"),
        ({"schedule": "linear", "schedule_options": {"phase": 1}}, "linear does not take its options"),
        ({"schedule": "cosine", "schedule_options": {"num_steps": "many"}}, "cosine does not take its options"),
        ({"schedule": "linear", "schedule_options": {"num_warmup_steps": -1}}, "0 or more"),
        ({"training": {"step_every": 0}}, "step_every"),
        ({"training": {"step_every": "x"}}, "step_every|training option"),
        ({"training": {"compile_mode": "default"}}, "compile_mode"),
        ({"training": {"max_batch_size": "all"}}, "max_batch_size"),
        ({"training": {"magic": True}}, "magic"),
        ({"training": {"codecs": "none"}}, "codecs"),
        ({"codecs": {"inputs": "zip"}}, "zip"),
        ({"codecs": {"inputs": 8}}, "travel in some of none, bf16"),
        ({"codecs": {"weights": "bf16"}}, "inputs, outputs, gradients; not for 'weights'"),
    ],
)
def test_what_this_version_cannot_do_is_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        complete(dataclasses.replace(DIGITS, **changes))


def test_code_by_import_path_runs_only_where_its_module_is_allowed() -> None:
    for modules in ((), ("os",), ("tests.server.test_run",), (f"{__name__}.deeper",)):
        with pytest.raises(ValueError, match=f"--allow-module {__name__}"):
            build_run_module(OWN, "ffn.0.0", allowed_modules=modules)
    with pytest.raises(ValueError, match="--allow-module"):  # a package is not all that lies in it
        check_allowed(OWN, (__name__.rpartition(".")[0],))
    check_allowed(OWN, (__name__,))
    assert isinstance(build_run_module(OWN, "ffn.0.0", allowed_modules=(__name__,)), nn.Linear)
    with pytest.raises(ValueError, match="--allow-module os"):
        build_run_module(dataclasses.replace(OWN, expert="os:system", sizes={"command": "true"}), "ffn.0.0")


@pytest.mark.parametrize("name", ["unmarked", "system", "renamed", "Unmarked", "marked_elsewhere", "_private", "torch"])
def test_a_run_names_nothing_of_an_allowed_module_but_what_it_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "allowed.py").write_text(
        "import torch\n"
        "from os import system\n"
        "import tesseract_async as ta\n"
        "from tests.server.test_run_experts import own_expert as marked_elsewhere\n"
        "def unmarked(command='true'): raise AssertionError('it ran')\n"
        "_private = unmarked\n"
        "class Unmarked: pass\n"
        "@ta.expert_builder\n"
        "def marked(width: int = 2): return torch.nn.Linear(width, width), (ta.TensorSpec((width,)),)\n"
        "renamed = marked\n"
    )
    run = dataclasses.replace(DIGITS, expert=f"allowed:{name}", sizes={"command": "touch pwned"})
    with pytest.raises(ValueError, match="@ta.expert_builder"):
        build_run_module(run, "ffn.0.0", allowed_modules=["allowed"])
    marked = dataclasses.replace(DIGITS, expert="allowed:marked", sizes={"width": 3})
    assert isinstance(build_run_module(marked, "ffn.0.0", allowed_modules=["allowed"]), nn.Linear)
    sys.modules.pop("allowed")


@pytest.mark.parametrize(
    ("expert", "sizes"),
    [
        ("ffn", {"in_features": 10**12}),
        ("ffn", {"in_features": 1, "hidden_features": 2**62}),
        ("ffn", {"in_features": 60_000}),
        ("linear", {"in_features": 1, "out_features": 10**12}),
        ("nop", {"in_features": 10**12}),
        ("transformer", {"in_features": 8, "sequence_length": 10**8}),
        ("transformer", {"in_features": 10**6}),
        (f"{__name__}:own_expert", {"width": 10**12}),
        (f"{__name__}:looks_at_numbers", {"width": 10**12}),
        (f"{__name__}:has_many_layers", {"num_layers": 10**9}),
        (f"{__name__}:has_many_layers", {"num_layers": 1, "width": 10**12}),
    ],
)
def test_what_a_run_asks_for_is_planned_before_anything_is_allocated(expert: str, sizes: dict[str, Any]) -> None:
    run = dataclasses.replace(DIGITS, expert=expert, sizes=sizes)
    before = psutil.Process().memory_info().rss
    with pytest.raises(ValueError, match="the run digits: "):
        build_run_backend(run, "ffn.0.0", allowed_modules=[__name__], max_bytes=2**30)
    assert psutil.Process().memory_info().rss - before < 2**28


def test_the_optimizer_counts_too() -> None:
    run = complete(dataclasses.replace(DIGITS, sizes={"in_features": 512, "hidden_features": 1024}))  # 8 MiB
    with pytest.raises(ValueError, match="in_features=512 takes 32 MiB or more; here it may take 24 MiB"):
        build_run_backend(run, "ffn.0.0", max_bytes=24 * 2**20)
    build_run_backend(run, "ffn.0.0", max_bytes=64 * 2**20)
    build_run_module(run, "ffn.0.0")


@ta.expert_builder
def looks_at_numbers(width: int) -> tuple[nn.Module, tuple[Any, ...]]:
    """As some modules do, which cannot be built on ``meta``."""
    rates = [one.item() for one in torch.linspace(0.0, 0.5, 2)]
    layers = nn.Sequential(nn.Linear(width, width), nn.Dropout(rates[1]))
    return layers, (TensorSpec((width,)),)


@ta.expert_builder
def has_many_layers(num_layers: int, width: int = 1) -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(num_layers))), (TensorSpec((width,)),)


def test_what_cannot_be_built_on_meta_is_watched_while_it_is_built() -> None:
    run = dataclasses.replace(DIGITS, expert=f"{__name__}:looks_at_numbers", sizes={"width": 8})
    assert len(build_run_module(run, "ffn.0.0", allowed_modules=[__name__])) == 2


def test_only_functions_of_a_module_with_a_public_name_are_marked() -> None:
    def inside() -> None: ...

    def _hidden() -> None: ...

    _hidden.__qualname__ = "_hidden"
    for thing, error in ((inside, TypeError), (nn.Linear, TypeError), (5, TypeError), (_hidden, ValueError)):
        with pytest.raises(error, match="an expert's builder"):
            ta.expert_builder(thing)  # type: ignore[arg-type]
