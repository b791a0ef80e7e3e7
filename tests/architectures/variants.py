"""Tiny random models of the architectures that transformers can build.

Windows, chunks and the lengths from which rotary positions change are longer than a few tokens and shorter than the
prompts of the tests, so that nothing which begins there is missed.
"""

from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

VOCAB = 128
W = 16  # sliding windows, chunks, rope thresholds
# Settings that every configuration gets which has an attribute of the name.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "sliding_window": W,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
    "mamba_d_ssm": 128,
    "time_step_rank": 4,
    "state_size": 16,
    "chunk_size": 16,
    "router_jitter_noise": 0.0,
    "input_jitter_noise": 0.0,
}
SF = ["sliding_attention", "full_attention"]
HYB = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
C = "causal"
MLA_HEADS = {"num_key_value_heads": 4, "head_dim": 8}

# By name: the Auto class (KINDS), the model type, and settings of its own.
ARCHS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # dense
    "llama": (C, "llama", {}),
    "llama31-rope": (
        C,
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama-dynamic-ntk": (
        C,
        "llama",
        {
            "max_position_embeddings": 24,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "mistral": (C, "mistral", {}),
    "ministral": (C, "ministral", {"layer_types": SF}),
    "ministral3": (
        C,
        "ministral3",
        {
            "sliding_window": None,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 16,
                "max_position_embeddings": 256,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.5,
            },
        },
    ),
    "qwen2": (C, "qwen2", {"use_sliding_window": True, "layer_types": SF}),
    "qwen3": (C, "qwen3", {"use_sliding_window": True, "layer_types": SF}),
    "qwen2_moe": (C, "qwen2_moe", {"use_sliding_window": True, "layer_types": SF}),
    "qwen3_moe": (C, "qwen3_moe", {"use_sliding_window": True}),
    "qwen3_next": (C, "qwen3_next", {"num_hidden_layers": 4, "layer_types": HYB}),
    "qwen3_5_text": (C, "qwen3_5_text", {"num_hidden_layers": 4, "layer_types": HYB}),
    "qwen3_5_moe_text": (C, "qwen3_5_moe_text", {"num_hidden_layers": 4, "layer_types": HYB}),
    "gemma": (C, "gemma", {}),
    "gemma2": (C, "gemma2", {"query_pre_attn_scalar": 16, "layer_types": SF}),
    "gemma3_text": (C, "gemma3_text", {"query_pre_attn_scalar": 16, "layer_types": SF}),
    "gemma3n_text": (
        C,
        "gemma3n_text",
        {
            "num_hidden_layers": 6,
            "layer_types": SF * 3,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 6,
            "tie_word_embeddings": True,
        },
    ),
    "gemma4_text": (
        C,
        "gemma4_text",
        {
            "num_hidden_layers": 4,
            "layer_types": SF * 2,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCAB,
            "global_head_dim": 32,
            "num_experts": None,
            "top_k_experts": None,
        },
    ),
    "gemma4_text-E": (
        C,
        "gemma4_text",
        {
            "num_hidden_layers": 6,
            "layer_types": SF * 3,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "num_experts": None,
            "top_k_experts": None,
            "use_double_wide_mlp": True,
        },
    ),
    "gemma4_text-moe": (
        C,
        "gemma4_text",
        {
            "num_hidden_layers": 2,
            "layer_types": SF,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCAB,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 48,
        },
    ),
    "phi": (C, "phi", {"num_key_value_heads": 4}),
    "phi3": (C, "phi3", {}),
    "phi3-longrope": (
        C,
        "phi3",
        {
            "sliding_window": None,
            "original_max_position_embeddings": 24,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [1.0, 1.1, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0],
                "original_max_position_embeddings": 24,
                "factor": 10.0,
                "partial_rotary_factor": 1.0,
            },
        },
    ),
    "phimoe": (C, "phimoe", {}),
    "olmo": (C, "olmo", {}),
    "olmo-clip": (C, "olmo", {"clip_qkv": 1.5}),
    "olmo2": (C, "olmo2", {}),
    "olmo3": (C, "olmo3", {"layer_types": SF}),
    "olmoe": (C, "olmoe", {}),
    "olmo_hybrid": (
        C,
        "olmo_hybrid",
        {"num_hidden_layers": 4, "layer_types": HYB, "num_key_value_heads": 4, "linear_num_key_heads": 4},
    ),
    "flex_olmo": (C, "flex_olmo", {}),
    "mixtral": (C, "mixtral", {}),
    "deepseek_v2": (C, "deepseek_v2", MLA_HEADS),
    "deepseek_v3": (C, "deepseek_v3", MLA_HEADS),
    "deepseek_v32": (C, "deepseek_v32", dict(**MLA_HEADS, index_topk=W, index_head_dim=16, index_n_heads=2)),
    "deepseek_v4": (C, "deepseek_v4", {}),
    "glm_moe_dsa": (C, "glm_moe_dsa", dict(**MLA_HEADS, index_topk=W, index_head_dim=16, index_n_heads=2)),
    "gpt_oss": (C, "gpt_oss", {"layer_types": SF}),
    "glm": (C, "glm", {}),
    "glm4": (C, "glm4", {}),
    "glm4_moe": (C, "glm4_moe", {}),
    "glm4_moe_lite": (C, "glm4_moe_lite", MLA_HEADS),
    "granite": (C, "granite", {}),
    "granite-real": (
        C,
        "granite",
        {
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.0625,
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
        },
    ),
    "minimax_m3": (C, "minimax_m3_vl_text", {}),
    "laguna": (C, "laguna", {}),
    "granitemoe": (C, "granitemoe", {}),
    "granitemoeshared": (C, "granitemoeshared", {"shared_intermediate_size": 48}),
    "granitemoehybrid": (
        C,
        "granitemoehybrid",
        {"num_hidden_layers": 4, "layer_types": HYB, "shared_intermediate_size": 48},
    ),
    "granitemoehybrid-attn": (
        C,
        "granitemoehybrid",
        {
            "num_hidden_layers": 2,
            "layer_types": ["full_attention"] * 2,
            "shared_intermediate_size": 48,
            "num_local_experts": 0,
            "position_embedding_type": "rope",
        },
    ),
    "falcon": (C, "falcon", {"multi_query": True, "alibi": False, "new_decoder_architecture": False}),
    "falcon-alibi": (C, "falcon", {"multi_query": False, "alibi": True}),
    "falcon_h1": (C, "falcon_h1", {}),
    "falcon_mamba": (C, "falcon_mamba", {}),
    "starcoder2": (C, "starcoder2", {}),
    "stablelm": (C, "stablelm", {"num_key_value_heads": 4}),
    "cohere": (C, "cohere", {"tie_word_embeddings": True}),
    "cohere2": (C, "cohere2", {"layer_types": SF, "tie_word_embeddings": True}),
    "nemotron": (C, "nemotron", {}),
    "nemotron_h": (
        C,
        "nemotron_h",
        {
            "layers_block_type": ["linear_attention", "full_attention", "linear_attention", "mlp"],
            "num_hidden_layers": 4,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "sliding_window": None,
        },
    ),
    "gpt2": (C, "gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "gptj": (C, "gptj", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8}),
    "gpt_neo": (C, "gpt_neo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": W}),
    "gpt_neox": (C, "gpt_neox", {}),
    "gpt_bigcode": (C, "gpt_bigcode", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "bloom": (C, "bloom", {"n_layer": 2, "n_head": 4}),
    "opt": (C, "opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.15}),
    "mpt": (C, "mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}),
    "codegen": (C, "codegen", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8}),
    "mamba": (C, "mamba", {}),
    "mamba2": (C, "mamba2", {"num_heads": 8, "head_dim": 16, "n_groups": 1}),
    "jamba": (
        C,
        "jamba",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": (C, "bamba", {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]}),
    "zamba2": (
        C,
        "zamba2",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention"],
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "num_key_value_heads": 4,
            "use_mamba_kernels": False,
            "head_dim": 32,
        },
    ),
    "rwkv": (C, "rwkv", {"attention_hidden_size": 64}),
    "recurrent_gemma": (
        C,
        "recurrent_gemma",
        {"num_hidden_layers": 3, "lru_width": 64, "num_attention_heads": 4, "num_key_value_heads": 1},
    ),
    "lfm2": (
        C,
        "lfm2",
        {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    ),
    "lfm2_moe": (
        C,
        "lfm2_moe",
        {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    ),
    "smollm3": (C, "smollm3", {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "hunyuan_v1_dense": (C, "hunyuan_v1_dense", {}),
    "hunyuan_v1_moe": (C, "hunyuan_v1_moe", {"moe_topk": 2}),
    "ernie4_5": (C, "ernie4_5", {}),
    "ernie4_5_moe": (C, "ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}),
    "seed_oss": (C, "seed_oss", {}),
    "apertus": (C, "apertus", {}),
    "arcee": (C, "arcee", {}),
    "exaone4": (C, "exaone4", {"layer_types": SF, "sliding_window_pattern": 2}),
    "llama4_text": (
        C,
        "llama4_text",
        {
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 96,
            "no_rope_layers": [1, 0, 1, 0],
            "layer_types": ["chunked_attention", "full_attention"] * 2,
            "attention_chunk_size": W,
            "floor_scale": W,
            "attn_scale": 0.5,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
        },
    ),
    "minimax": (
        C,
        "minimax",
        {"layer_types": ["linear_attention", "full_attention"], "block_size": 16, "sliding_window": None},
    ),
    "minimax_m2": (C, "minimax_m2", {}),
    "doge": (C, "doge", {"keep_window_size": W, "sliding_window": None}),
    "bitnet": (C, "bitnet", {}),
    "dots1": (C, "dots1", {"num_key_value_heads": 2, "layer_types": SF}),
    "xglm": (C, "xglm", {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4, "init_std": 0.15}),
    "kimi_linear": (
        C,
        "kimi_linear",
        {
            "num_hidden_layers": 4,
            "layer_types": HYB,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "num_key_value_heads": 4,
        },
    ),
    "mimo_v2_flash": (C, "mimo_v2_flash", {}),
    "helium": (C, "helium", {}),
    "nanochat": (C, "nanochat", {}),
    "diffllama": (C, "diffllama", {}),
    "persimmon": (C, "persimmon", {}),
    "biogpt": (C, "biogpt", {}),
    "dbrx": (
        C,
        "dbrx",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        },
    ),
    "jetmoe": (C, "jetmoe", {"kv_channels": 16, "num_key_value_heads": 2, "num_attention_heads": None}),
    "afmoe": (C, "afmoe", {}),
    "minicpm3": (C, "minicpm3", MLA_HEADS),
    "modernbert-decoder": (
        C,
        "modernbert-decoder",
        {"local_attention": W, "num_hidden_layers": 3, "global_attn_every_n_layers": 3},
    ),
    "vaultgemma": (C, "vaultgemma", {"query_pre_attn_scalar": 16, "layer_types": SF}),
    "solar_open": (C, "solar_open", {}),
    "hy_v3": (C, "hy_v3", {}),
    "longcat_flash": (
        C,
        "longcat_flash",
        {
            "num_layers": 2,
            "ffn_hidden_size": 96,
            "expert_ffn_hidden_size": 48,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "num_key_value_heads": 4,
            "head_dim": 8,
        },
    ),
    "youtu": (C, "youtu", MLA_HEADS),
    "gemma3-chat": (C, "gemma3_text", {"query_pre_attn_scalar": 16, "layer_types": SF, "tie_word_embeddings": True}),
    "xlstm": (C, "xlstm", {"num_heads": 2, "qk_dim_factor": 1.0}),
    # VLMs
    "vlm-gemma3": ("vlm", "gemma3", {}),
    "vlm-gemma4": ("vlm", "gemma4", {}),
    "vlm-qwen2_5_vl": ("vlm", "qwen2_5_vl", {}),
    "vlm-qwen3_vl": ("vlm", "qwen3_vl", {}),
    "vlm-qwen3_5": ("vlm", "qwen3_5", {}),
    "vlm-mistral3": ("vlm", "mistral3", {}),
    "vlm-llava": ("vlm", "llava", {}),
    "vlm-llama4": ("vlm", "llama4", {}),
    # others
    "t5": ("seq2seq", "t5", {}),
    "bart": ("seq2seq", "bart", {}),
    "t5gemma": ("seq2seq", "t5gemma", {}),
    "bert": ("mlm", "bert", {}),
    "roberta": ("mlm", "roberta", {}),
    "modernbert": ("mlm", "modernbert", {}),
    "deberta_v2": ("mlm", "deberta-v2", {}),
}


KINDS = {
    C: transformers.AutoModelForCausalLM,
    "vlm": transformers.AutoModelForImageTextToText,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "mlm": transformers.AutoModelForMaskedLM,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION_14 = dict(**VISION, image_size=28, patch_size=14)
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 14,
    "spatial_merge_size": 2,
}


def kind_of(name: str) -> str:
    """One of KINDS."""
    return ARCHS[name][0]


def make_config(name: str) -> PreTrainedConfig:
    """The variant's tiny configuration."""
    kind, model_type, explicit = ARCHS[name]
    config_class = CONFIG_MAPPING[model_type]
    if kind == "causal":
        return config_class(**_settings(config_class, COMMON, explicit))
    if kind == "seq2seq":
        return _seq2seq_config(model_type)
    if kind == "vlm":
        return _vlm_config(model_type)
    encoder = {"type_vocab_size": 2, "local_attention": W, "eos_token_id": 2, "sep_token_id": 2, "cls_token_id": 1}
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    return config_class(**_settings(config_class, {**COMMON, **encoder, **relative}, explicit))


def make_deep_config(name: str) -> PreTrainedConfig:
    """The configuration with twice as many layers, each kind of which comes again."""
    config = make_config(name)
    text = config.get_text_config(decoder=True)
    count = text.num_hidden_layers
    if getattr(text, "per_layer_config", None):  # which knows layers by their numbers
        return config
    for key, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == count and "multiplier" not in key:  # of sizes, not of layers
            setattr(text, key, 2 * value)
    text.num_hidden_layers = 2 * count
    return config


def make_model(name: str, seed: int = 0, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """The variant with random float32 weights, none of which is zero or one throughout, in evaluation mode."""
    auto_class = KINDS[kind_of(name)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class.from_config(config or make_config(name)).float()
        for path, parameter in model.named_parameters():
            _randomise(path, parameter.data)
    return model.eval()


def _randomise(path: str, weight: torch.Tensor) -> None:
    """Biases and norms start as zeros and ones, some matrices as zeros or as memory that holds anything."""
    kept = ("A_log", "dt_bias", "time_", ".D", "recurrent_param") if weight.ndim == 1 else ("A_log", "conv", "time_")
    if any(part in path for part in kept) or (weight.ndim > 1 and any(part in path for part in ("vision", "visual"))):
        return
    if weight.ndim == 1:
        mean = weight.mean()
        torch.nn.init.normal_(weight, mean.item() if torch.isfinite(mean) else 0.0, 0.1)
    elif not torch.isfinite(weight).all() or weight.abs().max() < 1e-6 or weight.abs().max() > 10:
        torch.nn.init.normal_(weight, 0.0, 0.1)


def _settings(config_class: type, wanted: dict[str, Any], explicit: dict[str, Any]) -> dict[str, Any]:
    """Those of `wanted` that the configuration has, and all of `explicit`."""
    default = config_class()

    def is_setting(name: str) -> bool:
        attribute = getattr(config_class, name, None)
        if isinstance(attribute, property) and attribute.fset is None:
            return False
        try:
            return hasattr(default, name)
        except Exception:  # a property that needs other settings
            return True

    return {**{name: value for name, value in wanted.items() if is_setting(name)}, **explicit}


def _text(model_type: str, **explicit: Any) -> dict[str, Any]:
    return _settings(CONFIG_MAPPING[model_type], COMMON, explicit)


def _seq2seq_config(model_type: str) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[model_type]
    tokens = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": None}
    if model_type == "t5":
        sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "initializer_factor": 2.0}
        return config_class(**tokens, **sizes, decoder_start_token_id=0)
    if model_type == "t5gemma":
        from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig

        wanted = {**COMMON, "query_pre_attn_scalar": 16, "layer_types": SF}
        part = {name: value for name, value in wanted.items() if hasattr(T5GemmaModuleConfig(), name)}
        return config_class(encoder=dict(part), decoder=dict(part), **tokens, bos_token_id=1)
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 96}.items()
    }
    starts = {"bos_token_id": 1, "decoder_start_token_id": 1, "forced_eos_token_id": None}
    return config_class(**tokens, **sides, **starts, d_model=64, max_position_embeddings=256, init_std=0.15)


def _vlm_config(model_type: str) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[model_type]
    gemma_ids = {"boi_token_index": 121, "eoi_token_index": 122}
    qwen_ids = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if model_type == "gemma3":
        text = _text("gemma3_text", query_pre_attn_scalar=16, layer_types=SF)
        image = {"vision_config": VISION_14, "mm_tokens_per_image": 4, "image_token_index": 120}
        return config_class(text_config=text, **image, **gemma_ids, tie_word_embeddings=False)
    if model_type == "gemma4":
        vision = dict(**VISION, num_key_value_heads=2, head_dim=16, position_embedding_size=64)
        ids = {
            "image_token_id": 120,
            "video_token_id": 121,
            "boi_token_id": 122,
            "eoi_token_id": 123,
            "audio_token_id": 124,
        }
        text = _text("gemma4_text", **ARCHS["gemma4_text-E"][2])
        ids |= {"boa_token_id": 125, "eoa_token_index": 126}
        return config_class(text_config=text, vision_config=vision, audio_config=None, **ids)
    if model_type == "qwen2_5_vl":
        text = _text("qwen2_5_vl_text", rope_parameters={**rope, "mrope_section": [2, 3, 3]})
        return config_class(text_config=text, vision_config={**QWEN_VISION, "fullatt_block_indexes": [1]}, **qwen_ids)
    if model_type == "qwen3_vl":
        rope |= {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
        vision = {**QWEN_VISION, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
        text = _text("qwen3_vl_text", rope_parameters=rope)
        return config_class(text_config=text, vision_config=vision, **qwen_ids)
    if model_type == "qwen3_5":
        text = _text("qwen3_5_text", num_hidden_layers=4, layer_types=HYB)
        return config_class(text_config=text, vision_config={**QWEN_VISION, "num_position_embeddings": 16}, **qwen_ids)
    if model_type == "mistral3":
        text = {"model_type": "mistral", **_text("mistral", sliding_window=None)}
        vision = {"model_type": "pixtral", **VISION_14, "head_dim": 16}
        return config_class(text_config=text, vision_config=vision, image_token_index=120, tie_word_embeddings=False)
    if model_type == "llava":
        text = {"model_type": "llama", **_text("llama")}
        vision = {"model_type": "clip_vision_model", **VISION_14, "projection_dim": 32}
        return config_class(text_config=text, vision_config=vision, image_token_index=120, image_seq_length=4)
    assert model_type == "llama4", f"no tiny configuration of {model_type!r}"
    text = {**_text("llama4_text"), **ARCHS["llama4_text"][2]}
    projector = {"projector_input_dim": 64, "projector_output_dim": 64, "vision_output_dim": 64}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    vision = dict(**sizes, **projector, intermediate_size=128)
    return config_class(text_config=text, vision_config=vision, image_token_index=120, **gemma_ids)
