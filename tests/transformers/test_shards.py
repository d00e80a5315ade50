"""Experts of checkpoints compute what Transformers does, and nothing else of the files is read."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tesseract_async.server.registry import build_module
from tesseract_async.transformers.families import experts_of
from tesseract_async.transformers.serving import family_of, manifest_fields, shards_of
from tesseract_async.transformers.shards import Checkpoint
from tests.transformers.swarm import build
from tests.transformers.tiny import FAMILIES, make_checkpoint
from tests.watching import calls_of

Makes = Callable[[str], Path]


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_those_of_the_family(family: str, checkpoint: Makes) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint(family), experts_implementation="eager")
    source = Checkpoint(checkpoint(family))
    backends = build(source, ["m.1.1", "m.1.6", "m.1.2"])
    fields = manifest_fields(source, dtype=None, master=None)
    described, schemas = build_module(fields["expert"], fields["sizes"], marked=True)
    _, module = experts_of(model)[1]
    x = torch.randn(5, 32)
    for uid, backend in backends.items():
        number = int(uid.rpartition(".")[2])
        for name, whole in module.named_parameters():
            assert torch.equal(backend.module.state_dict()[name], whole[number])
        with torch.no_grad():
            theirs = module(x, torch.full((5, 1), number), torch.ones(5, 1))
        assert torch.allclose(backend.forward([x])[0], theirs, atol=1e-6)
        described.load_state_dict(backend.module.state_dict())
        assert torch.equal(described(x), backend.forward([x])[0]) and schemas == backend.args_schema
    slabs = {one.untyped_storage().data_ptr() for backend in backends.values() for one in backend.module.parameters()}
    assert len(slabs) == len(list(module.parameters()))


def test_what_happens_to_an_experts_module_is_its_own(checkpoint: Makes) -> None:
    made = build(Checkpoint(checkpoint("qwen3_moe")), ["m.1.1", "m.1.6", "m.1.2"])
    one, other, third = (backend.module for backend in made.values())
    mode = third.act_fn.training
    for module in (one, other):
        module.act_fn.register_forward_hook(lambda *_: None)
        module.register_forward_hook(lambda *_: None)
        module.train(not mode)
    assert not third._forward_hooks and not third.act_fn._forward_hooks and third.act_fn.training == mode


def test_only_files_of_those_experts_are_opened(checkpoint: Makes) -> None:
    source = Checkpoint(checkpoint("qwen3_moe"))
    build(source, ["m.1.6", "m.1.7"])
    named = json.loads((checkpoint("qwen3_moe") / "model.safetensors.index.json").read_text())["weight_map"]
    expected = {file for key, file in named.items() if ".layers.1.mlp.experts.6." in key or ".1.mlp.experts.7." in key}
    assert source.opened == expected and len(expected) < len(set(named.values()))


def test_a_conversion_is_copied_per_parameter_and_not_per_name(checkpoint: Makes) -> None:
    source = Checkpoint(checkpoint("qwen3_moe"))
    with calls_of(copy.copy) as copies:
        build(source, [f"m.{layer}.{expert}" for layer in range(2) for expert in range(8)])
    made = [one for one in copies if type(one.arguments["x"]).__module__ == "transformers.core_model_loading"]
    # two parameters in each of two layers, and a spare copy of each; the files hold 48 names
    assert 0 < len(made) <= 8


def test_weights_are_kept_in_another_type_than_they_are_computed_in(checkpoint: Makes) -> None:
    source = Checkpoint(checkpoint("qwen3_moe"))
    plain = build(source, ["m.0.3"])["m.0.3"]
    backend = build(source, ["m.0.3"], dtype="bfloat16", master="float32", optimizer="adamw")["m.0.3"]
    x = torch.randn(4, 32)
    y = backend.forward([x.bfloat16()])[0]
    assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), plain.forward([x])[0], atol=0.05)
    gradients = backend.gradients([x.bfloat16()], [torch.ones(4, 32, dtype=torch.bfloat16)])[1]
    backend.step(gradients)
    assert {one.dtype for one in backend.module.parameters()} == {torch.float32}
    assert backend.optimizer is not None
    moments = [memory["exp_avg"].dtype for memory in backend.optimizer.state.values()]
    assert moments == [torch.float32] * 2


@pytest.mark.parametrize(
    ("uids", "reason"),
    [
        (["m.0.8"], "layer 0 of this model has the experts 0 to 7, and no 8"),
        (["m.2.0"], "no experts in layer 2, but in 0 to 1"),
        (["m.3"], r"PREFIX.LAYER.EXPERT, not m.3"),
    ],
)
def test_experts_that_the_model_does_not_have(uids: list[str], reason: str, checkpoint: Makes) -> None:
    with pytest.raises(ValueError, match=reason):
        build(Checkpoint(checkpoint("qwen3_moe")), uids)


def test_folders_that_are_no_such_checkpoint(tmp_path: Path, checkpoint: Makes) -> None:
    with pytest.raises(ValueError, match="no checkpoint of Transformers in safetensors"):
        Checkpoint(tmp_path)
    with pytest.raises(ValueError, match="llama has no experts"):
        Checkpoint(make_checkpoint("llama", tmp_path / "dense"))
    folder = tmp_path / "quantized"
    folder.mkdir()
    for file in checkpoint("qwen3_moe").iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(ValueError, match="keeps its weights in mxfp4: .* dequantize=True"):
        Checkpoint(folder)
    (folder / "config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    lost = index["weight_map"].pop("model.layers.0.mlp.experts.3.up_proj.weight")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="does not hold the experts of layer 0"):
        build(Checkpoint(folder), ["m.0.3"])
    (folder / lost).unlink()
    (folder / lost).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        build(Checkpoint(folder), ["m.0.3", "m.0.4", "m.0.2"])


@pytest.mark.parametrize(
    "hostile",
    [
        {"model_type": "evil", "auto_map": {"AutoConfig": "configuration_evil.Evil"}},
        {"num_attention_heads": 0},
        {"hidden_size": "large"},
        {"vocab_size": 10**30},
        {"quantization_config": 5},
        5,
    ],
)
def test_a_hostile_configuration_is_an_error(hostile: Any, tmp_path: Path, checkpoint: Makes) -> None:
    for file in checkpoint("qwen3_moe").glob("*.safetensors*"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "configuration_evil.py").write_text("raise SystemExit")
    config = json.loads((checkpoint("qwen3_moe") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | hostile if isinstance(hostile, dict) else hostile))
    with pytest.raises(ValueError, match="holds no"):
        Checkpoint(tmp_path)


def test_a_configuration_chooses_no_code_for_attention(tmp_path: Path, checkpoint: Makes) -> None:
    for file in checkpoint("qwen3_moe").glob("*.safetensors*"):
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((checkpoint("qwen3_moe") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attn_implementation": "somebody/kernel"}))
    assert Checkpoint(tmp_path).config._attn_implementation == "eager"


def test_files_of_another_checkpoint_than_the_runs_are_refused(checkpoint: Makes) -> None:
    source = Checkpoint(checkpoint("qwen3_moe"))
    source.shards = frozenset(shards_of(source))
    build(source, ["m.0.3"])
    other = Checkpoint(checkpoint("qwen3_moe"))
    other.shards = source.shards - {source.digest(max(source.opened))}
    with pytest.raises(ValueError, match="is not a file of the checkpoint that the run began from"):
        build(other, ["m.0.3"])


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("os.system", "has no os.system"),
        ("../os.X", "not a family"),
        ("mixtral.MixtralModel", "no experts that Transformers lets others compute"),
        ("mixtral.nn", "no experts"),
    ],
)
def test_a_strangers_family_of_experts(family: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        family_of(family, {})


@pytest.mark.parametrize(("family", "name"), [("switch_transformers", "Switch Transformers"), ("dbrx", "DBRX")])
def test_a_checkpoint_of_a_family_without_the_hook_is_named(
    family: str, name: str, tmp_path: Path, checkpoint: Makes
) -> None:
    from transformers import AutoConfig

    for file in checkpoint("qwen3_moe").glob("*.safetensors*"):
        (tmp_path / file.name).symlink_to(file)
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{name} computes its experts itself"):
        Checkpoint(tmp_path)


def test_numbers_of_eight_bits_are_refused(tmp_path: Path, checkpoint: Makes) -> None:
    from safetensors.torch import load_file, save_file

    for file in checkpoint("qwen3_moe").iterdir():
        short = (
            {name: x.to(torch.float8_e4m3fn) for name, x in load_file(file).items()} if "model-" in file.name else {}
        )
        if short:
            save_file(short, tmp_path / file.name, {"format": "pt"})
        else:
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(ValueError, match="holds numbers of the kind F8_E4M3: save the checkpoint in bfloat16"):
        build(Checkpoint(tmp_path), ["m.0.3"])


def test_a_family_without_the_hook_is_named() -> None:
    from types import SimpleNamespace

    model = nn.Linear(1, 1)
    model.config = SimpleNamespace(model_type="dbrx")  # type: ignore[assignment]
    with pytest.raises(ValueError, match="DBRX computes its experts itself"):
        experts_of(model)


def test_an_older_transformers_is_named(monkeypatch: pytest.MonkeyPatch, checkpoint: Makes) -> None:
    monkeypatch.setattr("transformers.__version__", "5.11.2")
    with pytest.raises(ValueError, match="needs Transformers 5.12 or later, and 5.11.2 is installed"):
        Checkpoint(checkpoint("qwen3_moe"))
