"""From a manifest to experts: the same everywhere, nothing that the volunteer did not allow."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

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
        training={"step_every": 2, "clip_gradient_norm": 1.0},
    )
    backend = build_run_backend(complete(run), "ffn.0.0")
    backend.prepare()
    assert (backend.settings.step_every, backend.settings.clip_gradient_norm) == (2, 1.0)
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
        ({"sizes": {"width": 8}}, "does not take its sizes"),
        ({"sizes": {"in_features": -1}}, "does not take its sizes"),
        ({"optimizer": "lion"}, "'lion', which is not known here"),
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
    for modules in ((__name__,), (__name__.rpartition(".")[0],)):
        if modules != ("",):
            check_allowed(OWN, modules)
    assert isinstance(build_run_module(OWN, "ffn.0.0", allowed_modules=(__name__,)), nn.Linear)
    with pytest.raises(ValueError, match="--allow-module os"):
        build_run_module(dataclasses.replace(OWN, expert="os:system", sizes={"command": "true"}), "ffn.0.0")
