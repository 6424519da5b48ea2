"""Config fields that only one model type needs, for :mod:`tests.zoo.configs`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.zoo.image_fields import images

if TYPE_CHECKING:
    from tests.zoo.configs import Shape

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"


def fields_of(kind: str, shape: Shape) -> dict[str, Any]:
    """What model type ``kind`` needs beyond the common sizes, sub-configs as nested dicts."""
    return (_decoders(shape) | _pairs_and_encoders(shape) | images(shape)).get(kind, {})


def _decoders(s: Shape) -> dict[str, dict[str, Any]]:
    ssm = {"num_heads": s.ssm_heads, "head_dim": 2 * s.hidden // s.ssm_heads}
    sparse = {"mlp_layer_types": ["dense", "dense", "sparse", "sparse"], "num_hidden_layers": 4}
    pair = {"layer_types": [SLIDING, FULL, SLIDING, FULL], "num_hidden_layers": 4}
    even = {"num_attention_heads": 4 if s.heads == 5 else s.heads, "num_key_value_heads": 4 if s.heads == 5 else 2}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    windowed = {
        "rel_extent": 16,
        "swa_num_attention_heads": s.heads,
        "swa_num_key_value_heads": s.kv,
        "swa_head_dim": s.head_dim,
    }
    swa: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 10,
        "kv_lora_rank": 9,
        "head_dim": 10,
    }
    swa |= {"qk_nope_head_dim": 4, "v_head_dim": 5}
    note: dict[str, Any] = {f"swa_{name}": value for name, value in swa.items()} | {"head_dim": 4}
    note |= {"layer_types": ["indexed_attention", SLIDING] * 2} | sparse
    shared: dict[str, Any] = {"num_hidden_layers": 6, "layer_types": [SLIDING, FULL] * 3, "num_kv_shared_layers": 2}
    gemma4: dict[str, Any] = {"global_head_dim": s.head_dim + 4}
    gemma4_variants: list[dict[str, Any]] = [
        {},
        shared | {"use_double_wide_mlp": True},
        {"attention_k_eq_v": True, "num_global_key_value_heads": 2},
    ]
    gemma4 |= gemma4_variants[s.number]
    moe4 = {"enable_moe_block": True, "num_experts": s.experts, "top_k_experts": 2, "moe_intermediate_size": 13}
    indexer: dict[str, Any] = {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": s.head_dim + 2,
        "indexer_budget": 4,
    }
    qwen4: dict[str, Any] = indexer | {
        "indexer_compress_ratio": 2,
        "hc_lowrank": 6,
        "hc_count": 3,
        "ngram_vocab_size_base": 53,
    }
    qwen4 |= {"heads_per_ngram": 2, "make_ngram_vocab_size_divisible_by": 1, "split_ngram_parts": 1, "eos_token_id": 2}
    qwen4 |= {"ple_layer_ids": [1, 3], "ple_embed_dim": 12}
    local = {"hidden_size_global": s.hidden}
    experts = {"n_routed_experts": s.experts, "num_experts_per_tok": 2, "moe_intermediate_size": 13}
    return {
        "blt": {
            "patching_threshold": 4.0,
            "encoder_hash_byte_group_vocab": 53,
            "encoder_hash_byte_group_size": [3, 4],
            "encoder_config": local,
            "decoder_config": local,
        },
        "codegen": {"n_head": 8 if s.hidden != 40 else 4},
        "cohere2_moe": {"num_shared_experts": 1, "first_k_dense_replace": 2} | pair,
        "cohere_compass_text": {"layer_types": [SLIDING, FULL] * 2, "num_hidden_layers": 4}
        | {"rope_parameters": {SLIDING: rope, FULL: rope}},
        "dbrx": {
            "tie_word_embeddings": False,
            "attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {"moe_num_experts": s.experts, "moe_top_k": 2},
        },
        "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 2, "q_lora_rank": None if s.biases else 14},
        "deepseek_v4": {"o_groups": 2 if s.heads != 5 else 5}
        | {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 3}},
        "diffllama": even,
        "doge": {"is_moe": s.flip_tying, "num_experts": 9},
        "dots1": experts | {"n_shared_experts": 1, "first_k_dense_replace": 2},
        "dots3_note": {
            "text_config": note,
            "vision_config": {"mlp_bias": False, "adapter_in_dim": s.hidden, "adapter_out_dim": s.hidden},
            "audio_config": {"adapter_input_size": s.hidden, "adapter_out_dim": s.hidden},
        },
        "dots3_note_text": note,
        "falcon": [
            {},
            {"alibi": True, "multi_query": False, "num_kv_heads": s.heads},
            {"new_decoder_architecture": True, "num_kv_heads": 2},
        ][s.number],
        "gemma3n_text": shared | {"intermediate_size": [s.widths[0]] * 6, "laurel_rank": 7, "altup_num_inputs": 3},
        "gemma4": {"text_config": gemma4 | (moe4 if s.flip_tying else {})},
        "gemma4_text": gemma4 | moe4,
        "gemma4_unified": {"text_config": gemma4},
        "gemma4_unified_text": gemma4,
        "gpt_bigcode": {"multi_query": not s.biases},
        "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
        "granitemoehybrid": {"layer_types": [LINEAR, FULL] * 2, "num_hidden_layers": 4},
        "granitemoeshared": {"shared_intermediate_size": 18},
        "granitemoe_swa": {"shared_intermediate_size": 18},
        "helium": {"head_dim": s.hidden // s.heads},
        "hunyuan_v1_dense": {"head_dim": s.head_dim},
        "hunyuan_v1_moe": {"head_dim": s.head_dim, "num_experts": s.experts, "moe_topk": 2},
        "inkling_text": windowed,
        "inkling2_text": windowed,
        "jamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 1},
        "bailing_hybrid": {"linear_head_dim": s.head_dim},
        "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
        "lfm2": {"layer_types": ["conv", FULL] * 2, "num_hidden_layers": 4},
        "lfm2_moe": {"layer_types": ["conv", FULL] * 2, "num_hidden_layers": 4, "num_dense_layers": 2},
        "llama4": {"text_config": {"interleave_moe_layer_step": 2}},
        "llama4_text": {"interleave_moe_layer_step": 2},
        "longcat_flash": {"head_dim": 4, "zero_expert_num": 2},
        "mamba2": ssm,
        "mimo_v2_flash": {"num_attention_heads": 4, "num_key_value_heads": 2} if s.kv == s.heads else {},
        "ministral": {"head_dim": s.head_dim} | pair,
        "musicgen": {"decoder": {"add_cross_attention": True}},
        "nemotron": {"head_dim": s.head_dim},
        "qwen4_exp": {"text_config": qwen4},
        "qwen4_exp_text": qwen4,
        "recurrent_gemma": {"num_hidden_layers": 6},
        "reformer": {"axial_pos_shape": (8, 8), "axial_pos_embds_dim": (8, s.hidden - 8)}
        | {"attention_head_size": 6, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 4}
        | {"attn_layers": ["local", "lsh", "local", "lsh"]},
        "roc_bert": {"shape_vocab_size": 31, "pronunciation_vocab_size": 37},
        "xlnet": {"d_head": s.hidden // s.heads},
        "xmod": {"default_language": "en_XX"},
    }


def _pairs_and_encoders(s: Shape) -> dict[str, dict[str, Any]]:
    tokenizer = {"num_filters": 2, "depths": [1, 1, 1], "downsampling_ratios": [2, 2]}
    perceiver = {"num_latents": 9, "d_latents": 24, "num_self_attends_per_block": 2, "num_self_attention_heads": 3}
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 16}
    return {
        "led": {"attention_window": 4},
        "longt5": {"encoder_attention_type": "transient-global" if s.biases else "local"},
        "nemo_speechlm": {"audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": s.hidden}}}},
        "nllb-moe": {"encoder_layers": 4, "decoder_layers": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
        "vibevoice_asr": dict.fromkeys(
            ("acoustic_tokenizer_encoder_config", "semantic_tokenizer_encoder_config"), tokenizer
        ),
        "albert": {"num_hidden_groups": 1 + s.biases},
        "deberta": relative if s.biases else {},
        "deberta-v2": relative if s.biases else {},
        "esm": {"vocab_size": s.vocabulary, "pad_token_id": 1, "mask_token_id": 32},
        "esmc": {"num_key_value_heads": s.heads, "head_dim": s.hidden // s.heads},
        "funnel": {"block_sizes": [2, 2], "block_repeats": [1, 1]},
        "layoutlm": {"max_2d_position_embeddings": 64},
        "longformer": {"attention_window": 4},
        "luke": {"entity_vocab_size": 41, "entity_emb_size": 12},
        "mobilebert": {"intra_bottleneck_size": 4 * s.heads, "true_hidden_size": 4 * s.heads},
        "mpnet": {"relative_attention_num_buckets": 32},
        "neomme": {"head_dim": 16},
        "perceiver": perceiver | {"num_cross_attention_heads": 2},
        "squeezebert": {"embedding_size": s.hidden},
    }
