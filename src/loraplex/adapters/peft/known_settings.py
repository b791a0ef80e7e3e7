"""Settings in adapter_config.json that say nothing about what an adapter computes."""

# Settings of PEFT itself without influence on what a trained adapter computes.
HARMLESS = frozenset(
    {
        *("auto_mapping", "inference_mode", "peft_type", "peft_version", "revision", "runtime_config"),
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),  # of initialisation
        *("megatron_core", "qalora_group_size"),  # read only with megatron_config, use_qalora
        *("monteclora_config", "velora_config"),  # noise and a cheaper backward pass, in training only
    }
)

# What training tools, hubs and early versions of PEFT write beside them.
METADATA = frozenset(
    {
        *("unsloth_fixed", "unsloth_version"),
        *("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "loraplus_lr_ratio", "swift_version"),  # ms-swift
        *("modules_mapping", "merge_weights", "ephemeral_gpu_offload", "lora_plus_scale"),
        # of PEFT's prompt methods, in files of its first versions
        *("num_layers", "num_attention_heads", "num_transformer_submodules", "token_dim"),
        *("base_model_class", "base_model_revision", "parent_library", "library_name"),
        *("transformers_version", "torch_dtype", "dtype", "model_name", "model_type", "architectures"),
        *("name", "description", "license", "tags", "_name_or_path", "_commit_hash"),
    }
)

# Settings that are on or off: PEFT asks whether the value is true, so that null and 0 are off and 1 is on.
SWITCHES = ("use_rslora", "use_dora", "fan_in_fan_out")


def switch(value: object) -> object:
    """A switch as a bool, where null, 0 or 1 stand for one; anything else as it is, for LoraConfig to refuse."""
    if value is None:
        return False
    return bool(value) if isinstance(value, int) and value in (0, 1) else value
