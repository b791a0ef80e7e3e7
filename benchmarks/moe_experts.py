"""What do adapters of a mixture-of-experts model's experts cost, when every row of a batch has its own?

python benchmarks/moe_experts.py                        # 8 rows in bf16 and fp32
python benchmarks/moe_experts.py --cases float32:8 --no-save

A random small Qwen3-MoE decodes through the engine: rows without adapters, rows that share one, and rows with one each,
whose adapters are of the experts' stacked weights and of the router. "PEFT, one for all" is PEFT's generate with one
adapter for all rows: it can't mix adapters of parameters in a batch.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import peft
import torch
from common import alternate, console, medians, print_table, save
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams

PARAMETERS = ("experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight")
PROMPT_TOKENS = 32
PEFT_TOKENS = 4  # which take as long as many of ours
SIDES = ("none", "one for all", "one each")


def make_base(options: argparse.Namespace, dtype: torch.dtype) -> PreTrainedModel:
    config = Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=options.hidden,
        intermediate_size=2 * options.hidden,
        moe_intermediate_size=options.hidden // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
        max_position_embeddings=1024,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).to(dtype).eval()


def write_adapters(base: PreTrainedModel, folder: Path, count: int, rank: int) -> list[Path]:
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=list(PARAMETERS))
    adapted = peft.get_peft_model(base, config)
    paths = []
    for i in range(count):
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        adapted.save_pretrained(str(folder / f"adapter{i}"))
        paths.append(folder / f"adapter{i}")
    return paths


def tokens_per_s(engine: Engine, names: Sequence[str | None], new_tokens: int) -> float:
    """Of decoding: beyond the first token of each row."""
    ids = torch.randint(8, 8000, (len(names), PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))

    def seconds(num_tokens: int) -> float:
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        rows = zip(ids.tolist(), names, strict=True)
        start = time.perf_counter()
        engine.generate([Request(prompt, adapters=name, sampling=sampling) for prompt, name in rows])
        return time.perf_counter() - start

    first = seconds(1)
    return len(names) * (new_tokens - 1) / (seconds(new_tokens) - first)


def measure(options: argparse.Namespace, dtype: str, num_rows: int) -> dict[str, float]:
    """Medians of tokens/s, alternating in one process."""
    base = make_base(options, getattr(torch, dtype))
    plain = MultiLoraModel(make_base(options, getattr(torch, dtype)))
    model = MultiLoraModel(make_base(options, getattr(torch, dtype)))
    with tempfile.TemporaryDirectory() as folder:
        paths = write_adapters(copy.deepcopy(base), Path(folder), num_rows, options.rank)
        for path in paths:
            model.load_adapter(path.name, path)
        with_peft = peft.PeftModel.from_pretrained(base, str(paths[0]), autocast_adapter_dtype=False).eval()
    names = [path.name for path in paths]
    engine = EngineConfig(cache_bytes=2**26)
    with Engine(plain, engine) as without, Engine(model, engine) as ours:
        runs = {
            "none": lambda: tokens_per_s(without, [None] * num_rows, options.new_tokens),
            "one for all": lambda: tokens_per_s(ours, names[:1] * num_rows, options.new_tokens),
            "one each": lambda: tokens_per_s(ours, names, options.new_tokens),
            "PEFT, one for all": lambda: peft_tokens_per_s(with_peft, num_rows, PEFT_TOKENS),
        }
        return medians(alternate(runs, options.rounds))


@torch.no_grad()
def peft_tokens_per_s(model: peft.PeftModel, num_rows: int, new_tokens: int) -> float:
    ids = torch.randint(8, 8000, (num_rows, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False}
    start = time.perf_counter()
    model.generate(**inputs, min_new_tokens=new_tokens, max_new_tokens=new_tokens)
    return num_rows * new_tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["bfloat16:8", "float32:8"])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    results = []
    for case in options.cases:
        dtype, rows = case.split(":")
        console.print(f"{rows} rows, {dtype} ...")
        results.append({"dtype": dtype, "rows": int(rows), "tokens_per_s": measure(options, dtype, int(rows))})
    columns = (*SIDES, "PEFT, one for all")
    print_table(
        f"Qwen3-MoE, {options.layers} layers, {options.top_k} of {options.experts} experts, rank {options.rank}",
        ["case", *columns, "one each / none"],
        [
            [
                f"{r['dtype']}, {r['rows']} rows",
                *(f"{r['tokens_per_s'][side]:.0f}" for side in columns),
                f"{r['tokens_per_s']['one each'] / r['tokens_per_s']['none']:.2f}",
            ]
            for r in results
        ],
    )
    if not options.no_save:
        save("moe_experts", vars(options) | {"prompt_tokens": PROMPT_TOKENS, "parameters": PARAMETERS}, results)


if __name__ == "__main__":
    main()
