"""How much memory does training take on a base model in 4 bits, beside the same one in bfloat16?

python benchmarks/quantized_training.py                 # a random Llama of 1.1B parameters; Linux only
python benchmarks/quantized_training.py --gradient-checkpointing

Fresh processes load a checkpoint, in bfloat16 or quantized, then train four LoRAs together for some steps. The
high-water mark of resident memory starts after the base model is loaded. Both train on the same records.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import console, print_table, save
from memory import peak_bytes, start_new_peak
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loraplex import MultiLoraModel
from loraplex.adapters.config import LoraConfig
from loraplex.training import AdapterJob, TrainConfig, train_adapters
from loraplex.training.core.config import EvaluationConfig, StepsConfig

SHAPE = {  # TinyLlama's
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
WORDS = 1000
NUM_JOBS = 4
TARGETS = ("q_proj", "v_proj")


def write_bases(folder: Path, layers: int, kinds: Sequence[str] = ("bfloat16", "nf4")) -> None:
    """The same random model in bfloat16 and in 4 bits, all layers alike, and a tokenizer of some words."""
    one = folder / "one"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": 1})).to(torch.bfloat16).save_pretrained(one)
    write_layers(one, folder / "bfloat16", layers)
    if "nf4" not in kinds:
        return
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )
    base = LlamaForCausalLM.from_pretrained(one, dtype=torch.bfloat16, quantization_config=quantized)
    base.save_pretrained(folder / "one-nf4")
    write_layers(folder / "one-nf4", folder / "nf4", layers)


def write_layers(one: Path, folder: Path, layers: int) -> None:
    """A checkpoint of so many layers like the one that another has."""
    folder.mkdir()
    config = json.loads((one / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    tensors = {}
    for name, tensor in load_file(one / "model.safetensors").items():
        for layer in range(layers):
            tensors[name.replace("layers.0.", f"layers.{layer}.")] = tensor.clone() if layer else tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, **{f"w{i}": 2 + i for i in range(WORDS)}}, unk_token="<pad>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)


def write_records(path: Path, job: int, words: int) -> None:
    generator = torch.Generator().manual_seed(job)
    lines = [" ".join(f"w{i}" for i in torch.randint(WORDS, (words,), generator=generator)) for _ in range(8)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


def measure_here(base: Path, options: argparse.Namespace) -> dict[str, float]:
    """In a fresh process: the memory before and after loading, its peak while training, and the seconds of a step."""
    start_new_peak()
    before = peak_bytes()
    model = MultiLoraModel.from_pretrained(base, dtype="bfloat16", fast_decode=False)
    start_new_peak()
    loaded = peak_bytes()
    with tempfile.TemporaryDirectory() as output:
        jobs = []
        for job in range(NUM_JOBS):
            write_records(Path(output) / f"{job}.jsonl", job, options.words)
            jobs.append(
                AdapterJob(
                    name=f"job{job}",
                    data=Path(output) / f"{job}.jsonl",
                    lora=LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=TARGETS),
                    steps=StepsConfig(max_steps=options.steps, batch_size=1, max_length=options.words + 8),
                    evaluation=EvaluationConfig(eval_fraction=0),
                )
            )
        start = time.perf_counter()
        run = TrainConfig(
            output=Path(output) / "out",
            plots=False,
            progress=False,
            tokens_per_forward=options.tokens_per_forward,
            gradient_checkpointing=options.gradient_checkpointing,
        )
        train_adapters(model, model.tokenizer, jobs=jobs, config=run)
        seconds = time.perf_counter() - start
    return {"before": before, "loaded": loaded, "peak": peak_bytes(), "seconds_per_step": seconds / options.steps}


def measure(base: Path, options: argparse.Namespace) -> dict[str, float]:
    """`measure_here` in a fresh process."""
    arguments = [sys.executable, __file__, "--base", str(base)]
    for name in ("words", "steps", "rank", "tokens_per_forward"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    if options.gradient_checkpointing:
        arguments.append("--gradient-checkpointing")
    run = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise SystemExit(f"the measured process failed:\n{run.stderr}")
    figures: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return figures


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--words", type=int, default=64, help="of a record; a step has one of each job")
    parser.add_argument("--tokens-per-forward", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="of both")
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--base", type=Path, default=None, help=argparse.SUPPRESS)  # that this process measures
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    if options.base is not None:
        print(json.dumps(measure_here(options.base, options)))
        return
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("this benchmark reads /proc/self, which only Linux has")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        write_bases(Path(folder), options.layers)
        for kind in ("bfloat16", "nf4"):
            console.print(f"training {NUM_JOBS} LoRAs on {kind} ...")
            results[kind] = measure(Path(folder) / kind, options)
    rows = []
    for kind, found in results.items():
        sizes = [f"{found[name] / 2**20:.0f} MiB" for name in ("loaded", "peak")]
        first = results["bfloat16"]
        shares = [found["peak"] / first["peak"], (found["peak"] - found["before"]) / (first["peak"] - first["before"])]
        rows.append([kind, *sizes, *(f"{share:.2f}" for share in shares), f"{found['seconds_per_step']:.1f}"])
    columns = ["weights", "loaded", "peak in training", "of bfloat16's", "without the libraries", "s a step"]
    print_table("Training on a quantized base", columns, rows)
    if not options.no_save:
        workload: dict[str, Any] = {
            "model": "random Llama of TinyLlama's shape",
            "layers": options.layers,
            "jobs": NUM_JOBS,
            "rank": options.rank,
            "words": options.words,
            "tokens_per_forward": options.tokens_per_forward,
            "gradient_checkpointing": options.gradient_checkpointing,
        }
        console.print(f"saved {save('quantized_training', workload, results)}")


if __name__ == "__main__":
    main()
