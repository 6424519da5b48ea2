"""Tiny, oddly shaped, randomised models: one entry an architecture, any other one from its shrunken defaults."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from gradsurgery.anatomy.discovery.inputs import dummy_inputs
from tests.zoo.configs import config_of

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


#: Architectures of the mappings that cannot be built here, and why.
NOT_BUILT = {
    "dinat": "needs the package natten",
    "gemma3n": "its vision tower needs the package timm; gemma3n_text is built",
    "gemma4_assistant": "every layer reads keys and values of another model, and such a config raises in transformers",
    "gemma4_unified_assistant": "as gemma4_assistant",
    "timm_wrapper": "needs the package timm",
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
    """Any architecture of ``transformers``, tiny; each of the first seeds has a shape of its own.

    Example:
        >>> build_any("qwen3", seed=2).config.num_key_value_heads
        1
    """
    import transformers

    table = getattr(transformers, auto)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = config_of(kind, seed, causal="CausalLM" in auto)
        config.architectures = []  # where the mapping holds several classes, the first
        config._attn_implementation = "eager"
        wanted = getattr(table._model_mapping[type(config)], "config_class", None)
        parts = [part for part in vars(config).values() if wanted is not None and type(part) is wanted]
        model = table.from_config(config) if not parts else table._model_mapping[type(config)]._from_config(parts[0])
    model.config._experts_implementation = "eager"
    return randomised(model, seed)


def runnable(kind: str, auto: str, seed: int = 0) -> tuple[nn.Module, Callable[[nn.Module], Tensor], float]:
    """The model of :func:`build_any`, a function that runs it, and the tolerance of comparisons between its outputs.

    In float64, or in float32 where the stock forward mixes the two.
    """
    failure: Exception = ValueError(f"{kind}: the outputs are not finite.")
    for dtype, tolerance in ((torch.float64, 2e-5), (torch.float32, 5e-4)):
        model = build_any(kind, auto, seed).to(dtype)
        run = outputs_of(model)
        try:
            with torch.no_grad():
                outputs = run(model)
            if torch.isfinite(outputs).all():
                return model, run, tolerance
        except RuntimeError as error:
            failure = error if dtype is torch.float64 else failure
    raise failure


@torch.no_grad()
def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter and learned buffer, so that no bias is zero, no norm is one and no two units are alike."""
    generator = torch.Generator().manual_seed(seed + 1)
    seen: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator)
            dims = parameter.shape[1:] if isinstance(module, _ConvNd) else parameter.shape[-1:]
            parameter.add_(noise * (0.6 / dims.numel() ** 0.5 if parameter.ndim > 1 else 0.2))
        table = getattr(module, "tid2eid", None)
        if isinstance(table, Tensor):  # experts by token, which only a checkpoint fills
            experts = len(next(module.parameters()))
            table.copy_(torch.rand(len(table), experts, generator=generator).argsort(-1)[:, : table.shape[1]])
    for module in model.modules():
        if isinstance(module, nn.Embedding):  # tokens differ, so that every expert is chosen by some
            module.weight.normal_(generator=generator)
    for name, buffer in model.named_buffers():
        if "bias" in name and buffer.is_floating_point() and buffer.ndim == 1:
            buffer += 0.1 * torch.rand(buffer.shape, generator=generator)
    _settle(model.eval(), generator)
    return model


def _settle(model: nn.Module, generator: torch.Generator) -> None:
    """Batch norms with the statistics of what reaches them: without, deep convolutional nets fade to nothing."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    for norm in norms:
        norm.train().reset_running_stats()
        norm.momentum = None
    model(**dummy_inputs(model, batch=8, seed=3))
    for norm in norms:
        mean, variance = norm.eval().running_mean, norm.running_var
        assert mean is not None and variance is not None
        mean.add_(0.1 * torch.randn(mean.shape, generator=generator))
        variance.mul_(0.7 + 0.6 * torch.rand(mean.shape, generator=generator)).add_(0.01)


def outputs_of(model: nn.Module) -> Callable[[nn.Module], Tensor]:
    """A function from the model to its first floating output, on inputs that discovery does not use."""
    fed = dummy_inputs(model, batch=3, length=11, seed=5)

    def run(m: nn.Module) -> Tensor:
        m.train().eval()  # some modules keep what they computed from their parameters while in eval mode
        return next(v for v in m(**fed).values() if isinstance(v, torch.Tensor) and v.is_floating_point())

    return run
