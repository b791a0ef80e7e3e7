"""Load a frozen base model and its tokenizer from an alias, a local folder or the hub; refuse what isn't one whole."""

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from loraplex.errors import BaseModelError, ConfigError, LoraplexError
from loraplex.json_files import MAX_BYTES, read_object
from loraplex.models.checkpoints.gguf_file import find_gguf_file, is_gguf_file, load_dequantized, load_gguf
from loraplex.models.checkpoints.int8_base import check_weights, quantize_base
from loraplex.models.checkpoints.packed_checkpoint import load_packed
from loraplex.models.checkpoints.quantized_base import load_options
from loraplex.models.checkpoints.smollm2 import ALIAS, convert_smollm2
from loraplex.validation import quoted

# transformers goes on without the last two, with other tokens that end an answer for example.
_JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_base_model(
    path_or_id: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    weights: str = "auto",
    quantization_config: Any = None,
    gguf_file: str | None = None,
) -> tuple[PreTrainedModel, str]:
    """Load a base model in evaluation mode with frozen weights; return it and where it came from.

    `path_or_id` is "smollm2-135m", a local folder or a hub id; the second value is the folder or the hub id,
    as `load_tokenizer` takes it. `dtype` is "float32", "bfloat16", "float16", the same as a torch.dtype, or
    "auto" for the checkpoint's own; `attn_implementation` and `quantization_config` are transformers'
    (quantized_base.py). With `weights="int8"`, linear weights are held as 8-bit integers (int8_base.py). `path_or_id`
    may be a GGUF file, or the folder or hub id that has the `gguf_file`; it is dequantized to `dtype`, or with
    `weights="int8"` its blocks are held as they are.

    Raises ConfigError for a dtype, device, `weights` or quantization config that can't be used, BaseModelError for a
    model that can't be loaded whole, is quantized in another way than is known here, or has an adapter beside it.
    """
    torch_device = parse_device(device)
    torch_dtype = check_weights(weights, parse_dtype(dtype), torch_device)
    source = resolve_base_model(path_or_id) if gguf_file is None else find_gguf_file(path_or_id, gguf_file)
    if quantization_config is not None and (weights == "int8" or is_gguf_file(source)):
        raise ConfigError(
            f"quantization_config is {quoted(quantization_config)}, but the weights come from {source!r} with "
            f"weights={weights!r}. Give only one of quantization_config, weights='int8' and a GGUF file."
        )
    if is_gguf_file(source):
        return _load_gguf(source, weights, torch_dtype, torch_device), source
    refuse_damaged_json(source)
    try:
        refuse_hidden_adapter(source)
        config = AutoConfig.from_pretrained(source)
        options = load_options(config, quantization_config, torch_device)
        if options and weights == "int8":
            raise ConfigError(f"{source!r} has quantized weights already. Leave weights='int8' out.")
        load = _load_packed if options.pop("packed", False) else _load_whole
        model, loading = load(source, config, torch_dtype, attn_implementation=attn_implementation, **options)
    except LoraplexError:
        raise
    except Exception as error:  # transformers, tokenizers and the hub raise all kinds for files that are damaged
        raise _unloadable("base model", source, error) from error
    if loading["missing_keys"]:
        raise BaseModelError(
            f"the checkpoint of base model {source!r} lacks {_some(loading['missing_keys'])}, which "
            f"{type(model).__name__} needs; they would be random. Give a complete checkpoint."
        )
    if not options:
        model = model.to(torch_device)
    model = model.eval().requires_grad_(False)
    if weights == "int8":
        quantize_base(model)
    return model, source


def _load_whole(
    source: str, config: PreTrainedConfig, dtype: torch.dtype | str, **options: Any
) -> tuple[Any, dict[str, Any]]:
    loaded: tuple[Any, dict[str, Any]] = auto_class_for(config).from_pretrained(
        source, config=config, dtype=dtype, output_loading_info=True, **options
    )
    return loaded


def _load_packed(
    source: str, config: PreTrainedConfig, dtype: torch.dtype | str, **options: Any
) -> tuple[Any, dict[str, Any]]:
    return load_packed(source, config, auto_class_for(config), dtype, **options)


def _load_gguf(source: str, weights: str, dtype: torch.dtype | str, device: torch.device) -> PreTrainedModel:
    try:
        file = Path(source)
        model = load_gguf(file) if weights == "int8" else load_dequantized(file, dtype, device)
        return model.eval().requires_grad_(False)
    except LoraplexError:
        raise
    except Exception as error:  # gguf and transformers raise all kinds for files that are damaged or of other models
        raise BaseModelError(f"can't load the GGUF file {source!r}: {type(error).__name__}: {error}") from error


def load_tokenizer(path_or_id: str | Path) -> PreTrainedTokenizerBase:
    """Load a base model's tokenizer; takes what `load_base_model` takes and what it returns.

    Raises BaseModelError where there is none.
    """
    source = resolve_base_model(path_or_id)
    refuse_damaged_json(source)
    folder, options = _tokenizer_place(source)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:
        raise _unloadable("tokenizer", source, error) from error
    return tokenizer


def _tokenizer_place(source: str) -> tuple[str, dict[str, str]]:
    """A GGUF file's tokenizer is that of the files beside it, if there are any: its own is read without some rules."""
    if not is_gguf_file(source):
        return source, {}
    file = Path(source)
    has_own = (file.parent / "tokenizer_config.json").is_file()
    return str(file.parent), {} if has_own else {"gguf_file": file.name}


def resolve_base_model(path_or_id: str | Path) -> str:
    """Return the local folder or GGUF file, or the hub id as it is; the alias wins over a folder of its name.

    Raises BaseModelError for a folder without config.json, and for what is neither a folder nor a hub id.
    """
    if path_or_id == ALIAS:
        return str(convert_smollm2())
    folder = Path(os.path.expanduser(path_or_id))
    if is_gguf_file(folder):
        return str(folder)
    if path_or_id and os.path.isdir(folder):  # the empty path would be the current folder
        if not (folder / "config.json").is_file():
            raise BaseModelError(
                f"{str(folder)!r} is not a base model's folder: it has no config.json. Give a folder that "
                f"transformers' save_pretrained wrote, a hub id, or {ALIAS!r}."
            )
        return str(folder)
    try:
        if isinstance(path_or_id, Path) or os.path.exists(folder):
            raise HFValidationError("a path is not a hub id")
        validate_repo_id(path_or_id)
    except HFValidationError as error:
        raise BaseModelError(
            f"base model {str(path_or_id)!r} is neither a folder nor a hub id. Give a folder that "
            f"transformers' save_pretrained wrote, a hub id such as 'owner/name', or {ALIAS!r}."
        ) from error
    return path_or_id


def auto_class_for(config: PreTrainedConfig) -> Any:
    """The Auto class that keeps the head which the checkpoint was saved with.

    Raises BaseModelError for a checkpoint with a head that generates, where transformers has no such class.
    """
    architecture, kind = (config.architectures or [""])[0], type(config)
    if architecture in _classes(MODEL_FOR_MULTIMODAL_LM_MAPPING, kind) and not architecture.endswith("ForCausalLM"):
        return AutoModelForMultimodalLM
    for ending, auto_class in _BY_ENDING.items():
        if architecture.endswith(ending):
            return auto_class
    if getattr(config, "is_encoder_decoder", False):
        return AutoModelForSeq2SeqLM
    # An encoder such as BERT has a causal class too, which nobody means; without a masked one it's a decoder.
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING:
        return AutoModelForCausalLM
    if architecture.endswith("ForConditionalGeneration"):
        raise BaseModelError(
            f"the checkpoint is a {architecture}, of which transformers would load only the part without an output "
            "layer. Load it by its own class, and give MultiLoraModel the model."
        )
    return AutoModel


_BY_ENDING = {
    "ForMaskedLM": AutoModelForMaskedLM,
    "ForCausalLM": AutoModelForCausalLM,
    "LMHeadModel": AutoModelForCausalLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
}


def _classes(mapping: Any, kind: type[PreTrainedConfig]) -> list[str]:
    """The names of the classes that a mapping has for a configuration."""
    found = mapping.get(kind, ())
    return [each.__name__ for each in (found if isinstance(found, tuple | list) else [found])]


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    """Return the torch.dtype of a name, or "auto". Raises ConfigError for any other."""
    if dtype == "auto" or dtype in DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise ConfigError(f"dtype {dtype!r} can't be used. Use one of {[*DTYPES, 'auto']} or the torch.dtype of that name.")


def parse_device(device: str | torch.device) -> torch.device:
    """Return the torch.device of a name. Raises ConfigError where torch doesn't know it or has none such."""
    try:
        torch_device = torch.device(device)
        torch.empty(0, device=torch_device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        alternatives = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {str(device)!r} can't be used: {reason}. Available here: {alternatives}.") from error
    return torch_device


def refuse_hidden_adapter(source: str) -> None:
    """Raise BaseModelError where a base model's folder or hub repository also holds an adapter.

    With PEFT installed, transformers would load the model that the adapter's settings name, or this one with the
    adapter in it; without PEFT, this one alone.
    """
    file = find_adapter_config_file(source)
    if file is not None:
        raise BaseModelError(
            f"base model {source!r} has an adapter beside it, {str(file)!r}: transformers would load the model that "
            "this file names, with the adapter in it, if PEFT is installed. Move adapter_config.json and the adapter's "
            "weights to a folder of their own, and load that as an adapter."
        )


def refuse_damaged_json(source: str) -> None:
    """Raise BaseModelError for a settings file in a local folder that holds no JSON object."""
    if not os.path.isdir(source):
        return
    for name in _JSON_FILES:
        file = Path(source) / name
        if not file.exists():
            continue
        try:
            read_object(file, BaseModelError, finite=False, max_bytes=MAX_BYTES)  # Mamba's time_step_limit is infinite
        except BaseModelError as error:
            raise BaseModelError(f"can't load the base model: {error}") from error


def refuse_injected_adapters(base: nn.Module) -> None:
    """Raise BaseModelError for a model that PEFT has put its own layers into: every row would go through them."""
    for path, module in base.named_modules():
        if type(module).__module__.split(".")[0] == "peft":
            where = f"{path!r} is" if path else "it is"
            raise BaseModelError(
                f"the base model holds an adapter of PEFT: {where} a {type(module).__name__}. Give the plain model: "
                "PEFT's unload() takes the adapter out, merge_and_unload() makes it part of the weights; or save the "
                "adapter and load its folder."
            )


def _unloadable(what: str, source: str, error: Exception) -> BaseModelError:
    place = "folder" if os.path.isdir(source) else "hub id (there is no such folder)"
    return BaseModelError(
        f"can't load the {what} from the {place} {source!r}: {type(error).__name__}: {error}. "
        f"Give a complete folder that transformers' save_pretrained wrote, a hub id that can be reached, "
        f"or {ALIAS!r}."
    )


def _some(names: set[str] | list[str], limit: int = 3) -> str:
    listed = ", ".join(sorted(names)[:limit])
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"
