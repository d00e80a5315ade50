"""Tiny random checkpoints of several families of mixtures of experts, in shards, as Transformers saves them."""

from pathlib import Path

import torch

BASE: dict[str, object] = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    head_dim=8,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
    intermediate_size=32,
)
_DEEPSEEK: dict[str, object] = dict(
    moe_intermediate_size=16,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    kv_lora_rank=8,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    topk_group=1,
    num_key_value_heads=4,
)
FAMILIES: dict[str, dict[str, object]] = {
    "mixtral": dict(num_local_experts=8, num_experts_per_tok=2),
    "qwen3_moe": dict(moe_intermediate_size=16, num_experts=8, num_experts_per_tok=4, norm_topk_prob=True),
    "qwen2_moe": dict(
        moe_intermediate_size=16, shared_expert_intermediate_size=32, num_experts=8, num_experts_per_tok=2
    ),
    "olmoe": dict(num_experts=8, num_experts_per_tok=2),
    "granitemoe": dict(num_local_experts=8, num_experts_per_tok=2),
    "gpt_oss": dict(num_local_experts=8, num_experts_per_tok=2, sliding_window=16, layer_types=["full_attention"] * 2),
    "deepseek_v2": dict(_DEEPSEEK, n_group=1),
    "deepseek_v3": dict(_DEEPSEEK, n_group=2, routed_scaling_factor=2.5),
}


def make_checkpoint(
    family: str, folder: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "20KB", **more: object
) -> Path:
    """Write one, and return its folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**BASE, **FAMILIES.get(family, {}), **more})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, one in (*model.named_parameters(), *model.named_buffers()):
            if "norm" not in name and "inv_freq" not in name:  # some are zeros, or never drawn
                one.normal_(0, 0.1)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
