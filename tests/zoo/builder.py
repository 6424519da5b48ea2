"""Tiny, oddly shaped, randomised models: one entry an architecture, any other one from its shrunken defaults."""

from __future__ import annotations

import torch
from torch import nn

TEXT = {"vocab_size": 97, "num_hidden_layers": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HF = {**TEXT, "hidden_size": 40, "intermediate_size": 52, "num_attention_heads": 4}
GQA = {**HF, "hidden_size": 42, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10}
MOE = {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 13}

#: ``name -> (auto class, model type, config)``
ZOO: dict[str, tuple[str, str, dict]] = {
    "gpt_neo": (
        "AutoModelForCausalLM",
        "gpt_neo",
        {**TEXT, "hidden_size": 36, "num_layers": 3, "num_heads": 3, "intermediate_size": 52, "window_size": 4}
        | {"attention_types": [[["global", "local", "global"], 1]], "max_position_embeddings": 64},
    ),
    "gpt2": ("AutoModelForCausalLM", "gpt2", {**TEXT, "n_embd": 36, "n_layer": 3, "n_head": 3, "n_inner": 52}),
    "llama": ("AutoModelForCausalLM", "llama", GQA),
    "llama_mha": ("AutoModelForCausalLM", "llama", {**GQA, "num_key_value_heads": 6, "attention_bias": True}),
    "qwen3": ("AutoModelForCausalLM", "qwen3", GQA),
    "qwen2": ("AutoModelForCausalLM", "qwen2", {**HF, "num_key_value_heads": 2}),
    "gemma3_text": ("AutoModelForCausalLM", "gemma3_text", {**GQA, "sliding_window": 4}),
    "gemma3_mqa": ("AutoModelForCausalLM", "gemma3_text", {**GQA, "num_key_value_heads": 1, "sliding_window": 4}),
    "phi3": ("AutoModelForCausalLM", "phi3", {**HF, "num_key_value_heads": 2}),
    "gpt_neox": ("AutoModelForCausalLM", "gpt_neox", HF),
    "bloom": ("AutoModelForCausalLM", "bloom", {**TEXT, "hidden_size": 40, "n_layer": 3, "n_head": 5}),
    "falcon_old": (
        "AutoModelForCausalLM",
        "falcon",
        {**HF, "multi_query": True, "new_decoder_architecture": False, "ffn_hidden_size": 52},
    ),
    "falcon_new": (
        "AutoModelForCausalLM",
        "falcon",
        {**HF, "hidden_size": 48, "num_attention_heads": 6, "num_kv_heads": 2, "new_decoder_architecture": True}
        | {"ffn_hidden_size": 52},
    ),
    "falcon_alibi": (
        "AutoModelForCausalLM",
        "falcon",
        {**HF, "multi_query": False, "new_decoder_architecture": False, "alibi": True, "bias": True},
    ),
    "opt": (
        "AutoModelForCausalLM",
        "opt",
        {**HF, "ffn_dim": 52, "word_embed_proj_dim": 40, "max_position_embeddings": 64},
    ),
    "mixtral": ("AutoModelForCausalLM", "mixtral", {**GQA, **MOE}),
    "gpt_oss": ("AutoModelForCausalLM", "gpt_oss", {**GQA, **MOE, "sliding_window": 4}),
    "olmo2": ("AutoModelForCausalLM", "olmo2", {**HF, "num_key_value_heads": 2}),
    "deepseek_v3": (
        "AutoModelForCausalLM",
        "deepseek_v3",
        {**HF, "q_lora_rank": 14, "kv_lora_rank": 11, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 7}
        | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "n_shared_experts": 1}
        | {"moe_intermediate_size": 13, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    ),
    "mamba2": (
        "AutoModelForCausalLM",
        "mamba2",
        {**TEXT, "hidden_size": 24, "num_heads": 6, "head_dim": 8, "n_groups": 2, "state_size": 5, "chunk_size": 4},
    ),
    "mamba": ("AutoModelForCausalLM", "mamba", {**TEXT, "hidden_size": 24, "state_size": 5}),
    "t5": (
        "AutoModelForSeq2SeqLM",
        "t5",
        {"vocab_size": 97, "d_model": 40, "d_kv": 6, "d_ff": 52, "num_layers": 3, "num_heads": 5}
        | {"decoder_start_token_id": 0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16},
    ),
    "bart": (
        "AutoModelForSeq2SeqLM",
        "bart",
        {"vocab_size": 97, "d_model": 40, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
        | {"decoder_attention_heads": 5, "encoder_ffn_dim": 52, "decoder_ffn_dim": 44, "max_position_embeddings": 64},
    ),
    "bert": ("AutoModelForMaskedLM", "bert", HF),
    "vit": ("AutoModelForImageClassification", "vit", {**HF, "image_size": 24, "patch_size": 8, "num_labels": 7}),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """The tiny model ``name`` of the zoo, in eval mode, its weights far from default initialisation."""
    import transformers

    auto, kind, fields = ZOO[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.CONFIG_MAPPING[kind](**fields)
        config._attn_implementation = "eager"
        model = getattr(transformers, auto).from_config(config)
    model.config._experts_implementation = "eager"  # the grouped kernel has no float64
    return randomised(model, seed)


def build_any(kind: str, auto: str = "AutoModelForCausalLM", seed: int = 0) -> nn.Module:
    """Any architecture of ``transformers``, from a shrunken default config."""
    import transformers

    from gradsurgery.anatomy.discovery.shrink import shrunken

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, auto).from_config(shrunken(transformers.CONFIG_MAPPING[kind]()))
    model.config._experts_implementation = "eager"
    return randomised(model, seed)


@torch.no_grad()
def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter and learned buffer, so that no bias is zero, no norm is one and no two units are alike."""
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise * (0.6 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.2))
    for module in model.modules():
        if isinstance(module, nn.Embedding):  # tokens differ, so that every expert is chosen by some
            module.weight.normal_(generator=generator)
    for name, buffer in model.named_buffers():
        if "bias" in name and buffer.is_floating_point() and buffer.ndim == 1:
            buffer += 0.1 * torch.rand(buffer.shape, generator=generator)
    return model.eval()
