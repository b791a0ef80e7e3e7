"""A Llama as llama.cpp reads it."""

from pathlib import Path

from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf.quants import quantize
from torch import Tensor
from transformers import LlamaConfig

from loraplex.models.checkpoints.gguf_names import interleaved
from loraplex.models.checkpoints.loading import load_base_model


def write_gguf(model_folder: str, path: Path, kind: str) -> None:
    """Write a model with its matrices as `kind` ("BF16", "Q8_0", ...) and without a vocabulary: it gets token ids."""
    model, _ = load_base_model(model_folder, dtype="bfloat16")
    config = model.config
    assert isinstance(config, LlamaConfig), f"not a Llama: {type(config).__name__}"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for path_of, weight in model.state_dict().items():
        if path_of == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(path_of, try_suffixes=(".weight",))
        assert name is not None, f"GGUF has no name for {path_of}"
        values = reordered(path_of, weight, config).float().numpy()
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            as_kind = GGMLQuantizationType[kind]
            writer.add_tensor(name, quantize(values, as_kind), raw_dtype=as_kind)
    finish(writer)


def reordered(name: str, weight: Tensor, config: LlamaConfig) -> Tensor:
    """The rows of queries and keys in llama.cpp's order, in which rotary embeddings turn neighbours."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for module, num_heads in heads.items():
        if name.endswith(f"{module}.weight"):
            return interleaved(weight, num_heads)
    return weight


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
