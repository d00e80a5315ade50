"""TRL's trainers, which are built on that of Transformers. Skipped where TRL is not installed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.transformers.swarm import local, serving
from tests.transformers.test_remote import load
from tests.transformers.tiny import make_checkpoint

trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def fine_tuned(model: Any, folder: Path, **given: Any) -> list[float]:
    """Losses of TRL's trainer for supervised fine-tuning."""
    import tokenizers
    import transformers

    words = {name: number for number, name in enumerate(["<pad>", "<s>", "</s>", *map(str, range(61))])}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<pad>",
    )
    ids = torch.randint(3, 64, (16, 12), generator=torch.Generator().manual_seed(1)).tolist()
    # with a name of its own: to make one, `datasets` would pickle what newer pyarrows cannot
    data = datasets.Dataset(
        datasets.table.InMemoryTable.from_pydict({"input_ids": ids, "labels": ids}), fingerprint="x"
    )
    arguments = trl.SFTConfig(
        str(folder), max_steps=6, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        bf16=False, dataloader_pin_memory=False, per_device_train_batch_size=2,
        dataset_kwargs={"skip_prepare_dataset": True}, **given,
    )  # fmt: skip
    made = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    made.train()
    return [one["loss"] for one in made.state.log_history if "loss" in one]


@pytest.mark.parametrize("given", [{}, {"gradient_checkpointing": False, "gradient_accumulation_steps": 2}])
def test_supervised_fine_tuning(given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)  # its thread would outlive the test
    folder = make_checkpoint("qwen3_moe", tmp_path / "given")
    expected = fine_tuned(local(folder), tmp_path / "whole", **given)
    with serving(folder, optimizer="adamw", lockstep=True) as swarm:
        ours = fine_tuned(load(folder, swarm), tmp_path / "remote", **given)
    assert len(ours) == 6 and ours == pytest.approx(expected, abs=1e-5)
