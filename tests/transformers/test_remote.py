"""A model whose experts are remote computes, learns and is saved like the same model with all of its experts."""

import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tesseract_async as ta
from tests.transformers.swarm import Swarm, local, serving
from tests.transformers.tiny import FAMILIES, make_checkpoint

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
Checkpoints = Callable[[str], Path]


def load(folder: Path, swarm: Swarm, **kwargs: Any) -> Any:
    return load_with(folder, swarm.node, **kwargs)


def load_with(folder: Path, node: ta.BackgroundNode, **kwargs: Any) -> Any:
    with ta.transformers.remote_experts(node, "m"):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def check_same(remote: Any, whole: Any, *, num_tokens: int) -> None:
    """Logits, gradients and greedy tokens."""
    for model in (remote, whole):
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
    expected = {name: x.grad for name, x in whole.named_parameters()}
    for name, x in remote.named_parameters():
        if name in expected:
            torch.testing.assert_close(x.grad, expected[name], rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(remote(IDS).logits, whole(IDS).logits, rtol=0, atol=1e-6)
    given = dict(max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False)
    assert torch.equal(remote.generate(IDS[:1], **given), whole.generate(IDS[:1], **given))


@pytest.fixture
def frozen(checkpoint: Checkpoints) -> Iterator[tuple[Path, Swarm]]:
    folder = checkpoint("qwen3_moe")
    with serving(folder) as swarm:
        yield folder, swarm


def test_it_is_the_model_and_asks_each_server_once_per_layer(frozen: tuple[Path, Swarm], tmp_path: Path) -> None:
    folder, swarm = frozen
    remote, whole = load(folder, swarm), local(folder)
    held = sum(x.numel() for x in remote.parameters())
    assert held - 2 == sum(x.numel() for name, x in whole.named_parameters() if ".experts." not in name)
    check_same(remote, whole, num_tokens=10)
    assert swarm.node.metrics.snapshot()["expert_calls{method=expert.info}"] == 3, "one vote for all layers"
    expected = {name: x.grad for name, x in whole.named_parameters()}
    for copied in (remote, copy.deepcopy(remote)):
        copied.train().activation_checkpointing_enable()
        copied.zero_grad()
        before = swarm.num_calls()
        loss = copied(input_ids=IDS, labels=IDS).loss
        assert swarm.num_calls() - before == 2 * 2, "one per layer and server"
        loss.backward()
        assert swarm.num_calls() - before == 2 * 2 * 2, "and none for what a checkpoint runs again"
        for name, x in copied.named_parameters():
            if name in expected:
                torch.testing.assert_close(x.grad, expected[name], rtol=0, atol=1e-5)
    from tesseract_async.transformers import operator

    del loss, x
    gc.collect()
    assert not operator._calls, "what no graph needs is not kept"
    copied.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.warns(UserWarning, match="use_reentrant=False"):
        copied(input_ids=IDS, labels=IDS).loss.backward()

    ta.transformers.export_checkpoint(remote, tmp_path / "out")
    given, written = tensors(folder), tensors(tmp_path / "out")
    assert given.keys() == written.keys() and all(torch.equal(given[name], written[name]) for name in given)
    with pytest.raises(FileExistsError):
        ta.transformers.export_checkpoint(remote, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_rest_alone_does_not_open_with_random_experts(frozen: tuple[Path, Swarm], tmp_path: Path) -> None:
    folder, swarm = frozen
    remote = load(folder, swarm)
    remote.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path, swarm)(IDS).logits, remote(IDS).logits, rtol=0, atol=1e-6)
    narrow = transformers.AutoConfig.from_pretrained(folder, moe_intermediate_size=8)
    with ta.transformers.remote_experts(swarm.node, "m"):
        other = transformers.AutoModelForCausalLM.from_config(narrow)
    with pytest.raises(ValueError, match=r"m\.0\.\d is not an expert of this model"):
        ta.transformers.export_checkpoint(other, tmp_path / "narrow")
    registered = transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="make it inside"):
        opened(IDS)
    function = registered._global_mapping.pop("tesseract")  # a process that knows nothing of it
    try:
        with pytest.raises(ValueError, match="tesseract"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        registered.register("tesseract", function)


def train(model: Any, *, num_steps: int = 6) -> list[float]:
    """Steps of two batches each, clipped in two ways, by a schedule; once gradients are thrown away."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.02, betas=(0.8, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, num_steps)
    losses, generator = [], torch.Generator().manual_seed(2)
    model.train()
    for step in range(num_steps):
        for _ in range(2):
            ids = torch.randint(3, 64, (1, 8), generator=generator)
            loss = model(input_ids=ids, labels=ids).loss
            (loss / 2).backward()
            losses += [loss.item()]
            if step == 2:
                optimizer.zero_grad()
        if step % 2:
            torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return losses


def test_in_lockstep_it_learns_as_if_all_of_it_were_here(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoint("mixtral")
    with serving(folder, optimizer="adamw", lockstep=True, checkpoints=tmp_path / "servers") as swarm:
        remote, whole = load(folder, swarm), local(folder)
        for ours, expected in zip(train(remote), train(whole), strict=True):
            assert abs(ours - expected) <= 1e-5
        assert ta.transformers.save_point(remote) == 5, "a step without gradients is none"
        remote.save_pretrained(tmp_path / "rest")
        ta.transformers.export_checkpoint(remote, tmp_path / "out")
        exported = local(tmp_path / "out")
        with torch.no_grad():
            torch.testing.assert_close(exported(IDS).logits, remote.eval()(IDS).logits, rtol=0, atol=1e-6)
        again = load(tmp_path / "rest", swarm)
        again(input_ids=IDS, labels=IDS).loss.backward()
        with pytest.raises(ValueError, match="not of Adagrad"):
            torch.optim.Adagrad(again.parameters()).step()
        assert train(again, num_steps=1)
        for stale in (tmp_path / "rest", folder):
            with pytest.raises(ValueError, match="have taken 6"):
                train(load(stale, swarm), num_steps=1)
        with pytest.raises(ValueError, match="nothing was exported"):
            ta.transformers.export_checkpoint(remote, tmp_path / "late")
        with pytest.raises(ValueError, match="of step 5"):
            remote(input_ids=IDS, labels=IDS).loss.backward()


def test_a_scaled_loss_and_gradients_that_were_changed_before_the_step(checkpoint: Checkpoints) -> None:
    folder = checkpoint("mixtral")
    with serving(folder, optimizer="sgd", lockstep=True, num_servers=1) as swarm:
        remote, whole = load(folder, swarm), local(folder)
        for model in (remote, whole):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            for factor in (1.0, 1.0, torch.inf):  # the last one is skipped
                scaler.scale(model(input_ids=IDS, labels=IDS).loss * factor).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        with torch.no_grad():
            torch.testing.assert_close(remote(IDS).logits, whole(IDS).logits, rtol=0, atol=1e-5)
        remote(input_ids=IDS, labels=IDS).loss.backward()
        with pytest.raises(ValueError, match="not that of order inf"):
            torch.nn.utils.clip_grad_norm_(remote.parameters(), 1.0, norm_type=torch.inf)
        torch.nn.utils.clip_grad_norm_(remote.parameters(), 1e-3)
        with pytest.raises(ValueError, match="clip them once, before the step"):
            remote(input_ids=IDS, labels=IDS).loss.backward()
        torch.nn.utils.clip_grad_value_(remote.parameters(), 1e-4)
        with pytest.raises(ValueError, match="not by both"):
            torch.optim.SGD(remote.parameters(), lr=0.1).step()
        remote.zero_grad()
        remote(input_ids=IDS, labels=IDS).loss.backward()
        second = load(checkpoint("mixtral"), swarm)
        second.model.embed_tokens.weight.data *= 2
        with torch.no_grad():
            next(x for name, x in second.named_buffers() if name.endswith("remote.round")).fill_(
                next(x for name, x in remote.named_buffers() if name.endswith("remote.round"))
            )
        second(input_ids=IDS, labels=IDS).loss.backward()  # forgets what the first trainer gathered
        with pytest.raises(ta.errors.RemoteError, match="another trainer is at work"):
            torch.optim.SGD(remote.parameters(), lr=0.1).step()


def test_bad_input_is_a_sentence(checkpoint: Checkpoints, tmp_path: Path) -> None:
    make = transformers.AutoModelForCausalLM.from_config
    with ta.BackgroundNode() as node:
        with pytest.raises(ValueError, match="no model whose layers have experts"):
            with ta.transformers.remote_experts(node, "m"):
                pass
        with pytest.raises(TypeError, match="BackgroundNode"):
            with ta.transformers.remote_experts(node.node, "m"):  # type: ignore[arg-type]
                pass
        llama4 = transformers.AutoConfig.for_model(
            "llama4_text", hidden_size=16, intermediate_size=16, intermediate_size_mlp=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, head_dim=8, vocab_size=32, num_local_experts=2,
        )  # fmt: skip
        with pytest.raises(ValueError, match="Llama 4"):
            with ta.transformers.remote_experts(node, "m"):
                make(llama4)
        config = transformers.AutoConfig.from_pretrained(checkpoint("mixtral"))
        with ta.transformers.remote_experts(node, "m", timeout=0.2):
            alone = make(config)
        with pytest.raises(ta.errors.NotEnoughExperts, match="no live server"):
            alone(IDS)
        with pytest.raises(ta.errors.ExpertNotFound):
            ta.transformers.export_checkpoint(alone, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        config.quantization_config = {"quant_method": "mxfp4"}
        with pytest.raises(ValueError, match="mxfp4"):
            with ta.transformers.remote_experts(node, "m"):
                make(config)
    with pytest.raises(ValueError, match="no remote experts"):
        ta.transformers.export_checkpoint(local(checkpoint("mixtral")), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_all_families(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path / "given")
    with serving(folder) as swarm:
        remote = load(folder, swarm)
        check_same(remote, local(folder), num_tokens=40)
        ta.transformers.export_checkpoint(remote, tmp_path / "out")
    given, written = tensors(folder), tensors(tmp_path / "out")
    assert given.keys() == written.keys() and all(torch.equal(given[name], written[name]) for name in given)


def trainer(model: Any, folder: Path, **given: Any) -> list[tuple[float, float]]:
    """Loss and norm of 30 steps of Transformers' own trainer."""
    generator = torch.Generator().manual_seed(1)
    data = [{"input_ids": (x := torch.randint(3, 64, (8,), generator=generator)), "labels": x} for _ in range(16)]
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=30, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False, **given,
    )  # fmt: skip
    made = transformers.Trainer(model, arguments, train_dataset=data)
    made.train()
    return [(one["loss"], one["grad_norm"]) for one in made.state.log_history if "loss" in one]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("mixtral", {}),
        ("qwen3_moe", {}),
        ("gpt_oss", {"learning_rate": 1e-3}),
        ("mixtral", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
        ("mixtral", {"per_device_train_batch_size": 1, "learning_rate": 1e-3}),
        ("mixtral", {"gradient_checkpointing": True, "max_grad_norm": 0.3}),
        ("mixtral", {"optim": "sgd", "learning_rate": 0.1}),
    ],
)
def test_the_trainer_of_transformers(family: str, given: dict[str, Any], tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path / "given")
    expected = trainer(local(folder), tmp_path, **given)
    with serving(folder, optimizer=given.get("optim", "adamw"), lockstep=True) as swarm:
        ours = trainer(load(folder, swarm), tmp_path, **given)
    assert len(ours) == 30
    for (loss, norm), (expected_loss, expected_norm) in zip(ours, expected, strict=True):
        assert abs(loss - expected_loss) <= 1e-5 and abs(norm - expected_norm) <= 1e-4


@pytest.mark.slow
def test_low_rank_adapters_on_frozen_experts(frozen: tuple[Path, Swarm], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder, swarm = frozen
    adapted = []
    for model in (load(folder, swarm), local(folder)):
        torch.manual_seed(0)
        adapted.append(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])))
    ours, expected = (trainer(model, tmp_path, learning_rate=1e-3) for model in adapted)
    assert all(abs(x[0] - y[0]) <= 1e-5 for x, y in zip(ours, expected, strict=True))
    adapted[0].save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(local(folder), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, adapted[0].eval()(IDS).logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="merge"):
        ta.transformers.export_checkpoint(adapted[0], tmp_path / "out")


@pytest.mark.slow
def test_half_the_digits_with_weights_kept_in_all_of_them(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path / "given", dtype=torch.bfloat16)
    with serving(folder, optimizer="adamw", lockstep=True, dtype="bfloat16", master="float32") as swarm:
        remote, whole = load(folder, swarm), local(folder, dtype=torch.float32)
        assert remote.dtype == torch.bfloat16
        for ours, expected in zip(train(remote), train(whole), strict=True):
            assert abs(ours - expected) <= 0.05
        ta.transformers.export_checkpoint(remote, tmp_path / "out")
        assert {x.dtype for x in tensors(tmp_path / "out").values()} == {torch.bfloat16}
        with torch.no_grad():
            exported = local(tmp_path / "out")(IDS).logits
            torch.testing.assert_close(exported, remote.eval()(IDS).logits, rtol=0, atol=0.05)


@pytest.mark.slow
def test_compiled_in_one_graph_with_and_without_checkpoints(frozen: tuple[Path, Swarm]) -> None:
    folder, swarm = frozen
    remote, whole = load(folder, swarm).train(), local(folder).train()
    whole(input_ids=IDS, labels=IDS).loss.backward()
    expected = {name: x.grad for name, x in whole.named_parameters()}
    for checkpoints in (False, True):
        if checkpoints:
            remote.activation_checkpointing_enable()
        compiled = torch.compile(remote, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            remote.zero_grad()
            before = swarm.num_calls()
            compiled(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
            assert swarm.num_calls() - before == 2 * 2 * 2
            for name, x in remote.named_parameters():
                if name in expected:
                    torch.testing.assert_close(x.grad, expected[name], rtol=0, atol=1e-5)
