"""Tiny models whose modules see rows in other ways than [rows, tokens, features]."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 128
SIDES: dict[str, Any] = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {"layers": 1, "attention_heads": 4, "ffn_dim": 96}.items()
}
STARTS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
BERT_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "initializer_range": 0.15,
    "pad_token_id": 0,
}


def _led() -> PreTrainedModel:
    lengths = {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "attention_window": [8]}
    config = transformers.LEDConfig(vocab_size=VOCAB, d_model=64, init_std=0.15, **SIDES, **STARTS, **lengths)
    return transformers.LEDForConditionalGeneration(config)


def _longformer() -> PreTrainedModel:
    config = transformers.LongformerConfig(**BERT_LIKE, max_position_embeddings=64, attention_window=[8])
    return transformers.LongformerForMaskedLM(config)


def _fsmt() -> PreTrainedModel:
    vocabularies = {"langs": ["en", "de"], "src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB}
    sizes = {"d_model": 64, "max_position_embeddings": 64, "init_std": 0.15, "is_encoder_decoder": True}
    return transformers.FSMTForConditionalGeneration(
        transformers.FSMTConfig(**vocabularies, **SIDES, **STARTS, **sizes)
    )


def _xlnet() -> PreTrainedModel:
    sizes = {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96, "initializer_range": 0.15}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return transformers.XLNetLMHeadModel(transformers.XLNetConfig(vocab_size=VOCAB, **sizes, **tokens))


def _switch() -> PreTrainedModel:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4, "initializer_factor": 1.0}
    experts = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4, "expert_capacity": 64}
    tokens = {"pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 0}
    config = transformers.SwitchTransformersConfig(vocab_size=VOCAB, **sizes, **experts, **tokens)
    return transformers.SwitchTransformersForConditionalGeneration(config)


def _big_bird() -> PreTrainedModel:
    sparse = {"max_position_embeddings": 64, "block_size": 4, "num_random_blocks": 1, "attention_type": "block_sparse"}
    return transformers.BigBirdForMaskedLM(transformers.BigBirdConfig(**BERT_LIKE, **sparse))


def _classifier() -> PreTrainedModel:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**BERT_LIKE, num_labels=3))


_MODELS: Mapping[str, Callable[[], PreTrainedModel]] = {
    "led": _led,
    "longformer": _longformer,
    "fsmt": _fsmt,
    "xlnet": _xlnet,
    "switch": _switch,
    "big_bird": _big_bird,
    "classifier": _classifier,
}


def layout_model(name: str) -> PreTrainedModel:
    """The model with seeded random weights, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _MODELS[name]().eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter.data, parameter.data.mean().item(), 0.1)
    return model
