"""Hybrid models with adapters of every kind, and what PEFT and transformers give a request of theirs alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex import MultiLoraModel, XLoraConfig
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import RequestResult
from loraplex.routing.adapter_spec import AdapterSpec
from tests.architectures.variants import make_model
from tests.engine.engines import INVOCATION, TIE, Prompted
from tests.parity.oracle import PeftOracle
from tests.tiny_models import random_peft_adapter

# By what they keep beside keys and values.
SHORT_CONVOLUTIONS = ("lfm2", "lfm2_moe")
DELTA_NETS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "vlm-qwen3_5", "olmo_hybrid", "kimi_linear")
STATE_SPACES = ("granitemoehybrid", "bamba", "falcon_h1", "nemotron_h", "zamba2")
HYBRIDS = (*SHORT_CONVOLUTIONS, *DELTA_NETS, *STATE_SPACES)
# By the module that the refusal must name, or its model.
REFUSED = {
    "jamba": "JambaMambaMixer",
    "recurrent_gemma": "RecurrentGemmaRecurrentBlock",
    "minimax": "MiniMaxLightningAttention",
    "mamba": "MambaForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "falcon_mamba": "FalconMambaForCausalLM",
    "rwkv": "RwkvForCausalLM",
    "xlstm": "xLSTMForCausalLM",
}
CHOICES: tuple[AdapterSpec, ...] = (None, "0", "1", "0:0.5+1:0.7", "alora", "science", "second", "science+1:0.3")
MIXTURES = ("science", "second", "third")
LINK = "link"  # the oracle's name for "0:0.5+1:0.7"


@dataclass(frozen=True)
class Hybrid:
    """One model, and PEFT's with the same adapters."""

    model: MultiLoraModel
    oracle: PeftOracle

    def logits(self, ids: list[int], choice: AdapterSpec) -> Tensor:  # [tokens, vocab]
        """All tokens in one forward pass without a cache: PEFT's, and for mixtures the model's own."""
        tokens = torch.tensor(ids)
        if any(mixture in str(choice) for mixture in MIXTURES):
            with torch.no_grad():
                return self.model(tokens[None], adapters=[choice], use_cache=False).logits[0]
        name = LINK if choice == "0:0.5+1:0.7" else choice
        return self.oracle.logits(name, tokens, torch.ones_like(tokens))


def make_hybrid(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Hybrid:
    base = make_model(name)
    targets = _linears(base)
    causal = {"task_type": "CAUSAL_LM"}
    alora = {**causal, "alora_invocation_tokens": INVOCATION}
    folders: Mapping[str, Path] = {
        "0": random_peft_adapter(base, folder / "0", targets=targets, seed=1, r=3, options=causal),
        "1": random_peft_adapter(base, folder / "1", targets=targets, seed=2, r=2, options=causal),
        "alora": random_peft_adapter(base, folder / "alora", targets=targets, seed=3, options=alora),
    }
    model = MultiLoraModel(make_model(name).to(dtype))
    for adapter, path in folders.items():
        model.load_adapter(adapter, path)
    model.create_mixture("science", ["0", "1"], XLoraConfig(layerwise_scalings=True, xlora_depth=2, xlora_size=16))
    model.create_mixture("second", ["1", "0"], XLoraConfig(scaling_pass_value=0.5, top_k_lora=1), seed=1)
    oracle = PeftOracle(base.to(dtype), folders)
    oracle.link(LINK, [("0", 0.5), ("1", 0.7)])
    return Hybrid(model, oracle)


def _linears(base: PreTrainedModel) -> list[str]:
    """All linear modules but the output layer, and but those that PEFT can't adapt in these models."""
    output = base.get_output_embeddings()
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and module is not output]
    names = [name for name in names if "visual" not in name]
    if any("experts" in name for name, _ in base.named_modules()):  # they see tokens without their sequences
        names = [name for name in names if not any(chunk in name for chunk in ("mlp", "moe", "feed_forward"))]
    refused = ("out_proj",) if base.config.model_type in ("falcon_h1", "nemotron_h") else ("kv_b_proj",)
    return [name for name in names if not name.endswith(refused)]


def tight_config(model: MultiLoraModel, num_sequences: int, num_blocks: int, **options: object) -> EngineConfig:
    """Room for about so many tracks' states and so many blocks of 8 tokens."""
    with Engine(model, EngineConfig(max_running=1, cache_bytes=2**22)) as engine:
        states, shapes = engine._runner._states, engine._runner.cache.shapes
        track_bytes = states.num_bytes // states.num_rows
        block_bytes = 8 * sum(shape.token_bytes for shape in shapes.values())
    cache_bytes = num_sequences * track_bytes + max(num_blocks * block_bytes, num_sequences * track_bytes)
    max_running = max(1, num_sequences // 2)
    return EngineConfig(cache_bytes=cache_bytes, block_tokens=8, max_running=max_running, max_length=80, **options)


def assert_greedy(hybrid: Hybrid, prompted: Prompted, result: RequestResult) -> None:
    """Every token of every answer is the largest of the oracle's logits, up to a tie."""
    assert result.error is None, f"{prompted.adapters}: {result.error}"
    for completion in result.completions:
        ids = [*prompted.prompt, *completion.token_ids]
        logits = hybrid.logits(ids, prompted.adapters)[len(prompted.prompt) - 1 : -1]  # [new tokens, vocab]
        taken = logits[torch.arange(len(logits)), torch.tensor(completion.token_ids)]
        gaps = (logits.max(dim=-1).values - taken) / (logits.max(dim=-1).values - logits.min(dim=-1).values)
        assert gaps.max() < TIE, f"{prompted.adapters}: tokens apart by {gaps.max():.1e} of the logits' range"


@torch.no_grad()
def logprobs_alone(base: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:  # [answer]
    """What transformers gives the tokens of an answer: the prompt in one pass, then each token, with its cache."""
    out = base(torch.tensor([prompt]), use_cache=True)
    logits = [out.logits[0, -1]]
    for place, token in enumerate(answer[:-1], len(prompt)):  # Bamba counts positions anew unless it is told them
        cache, positions = out.past_key_values, torch.tensor([[place]])
        out = base(torch.tensor([[token]]), past_key_values=cache, position_ids=positions, use_cache=True)
        logits.append(out.logits[0, -1])
    return torch.stack(logits).float().log_softmax(dim=-1)[torch.arange(len(answer)), torch.tensor(answer)]
