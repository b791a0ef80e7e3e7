"""The files of a base model that the sides of cpu_peers.py read; each is written once."""

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peers.gguf_files import write_gguf
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex.bench.random_adapters import load_model, write_random_folders
from loraplex.models.checkpoints.loading import load_tokenizer, resolve_base_model
from loraplex.models.convert.conversion import convert_to_gguf

RANDOM_LLAMA = "llama-1.1b"  # TinyLlama's shape with random weights
RANK = 8
TOKENIZER = "smollm2-135m"  # of the random model: no text is read, but some sides want one


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A base model in a folder of its own, as each side reads it."""

    name: str
    folder: Path
    num_adapters: int

    @property
    def transformers(self) -> str:
        if self.name != RANDOM_LLAMA:
            return resolve_base_model(self.name)
        return str(once(self.folder / "transformers", write_random_llama))

    @property
    def adapters(self) -> dict[str, str]:
        """PEFT's folders of random adapters, by name."""
        folder = once(self.folder / "adapters", self._write_adapters)
        return {f"adapter{i}": str(folder / f"adapter{i}") for i in range(self.num_adapters)}

    def gguf(self, kind: str) -> str:
        return str(once(self.folder / f"{kind}.gguf", lambda path: write_gguf(self.transformers, path, kind)))

    def gguf_adapters(self) -> dict[str, str]:
        """The first adapter as llama.cpp reads it: its rows share one."""
        name, folder = next(iter(self.adapters.items()))

        def convert(file: Path) -> None:
            file.unlink(missing_ok=True)  # of a run that ended early
            convert_to_gguf(Path(folder), file, base=self.transformers)

        path = once(self.folder / f"{name}.gguf", convert)
        return {name: str(path)}

    def openvino(self, weights: str, python: str) -> str:
        """The model as optimum-intel exports it, in the environment of `python`."""
        tool = Path(python).with_name("optimum-cli")
        command = [str(tool), "export", "openvino", "--task", "text-generation-with-past", "--weight-format", weights]

        def export(folder: Path) -> None:
            offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
            subprocess.run([*command, "--model", self.transformers, str(folder)], check=True, env=offline)

        return str(once(self.folder / f"openvino-{weights}", export))

    def _write_adapters(self, folder: Path) -> None:
        model = load_model(self.transformers, "bfloat16")
        write_random_folders(model.adaptable.shapes, folder, [RANK] * self.num_adapters, model.dtype)


def once(path: Path, write: Callable[[Path], None]) -> Path:
    """Let `write` make a file or folder that appears at `path` whole; nothing where it is already."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"unfinished-{path.name}")
        write(unfinished)
        unfinished.rename(path)
    return path


def write_random_llama(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(folder)
    load_tokenizer(TOKENIZER).save_pretrained(folder)
