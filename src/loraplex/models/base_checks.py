"""What would make a base model another one than its own weights: an adapter hidden in it, or files that are damaged."""

from pathlib import Path

from torch import nn
from transformers.utils.peft_utils import find_adapter_config_file

from loraplex.errors import BaseModelError
from loraplex.json_files import read_json

# transformers goes on without the last two, with other tokens that end an answer for example.
_JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")


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
    if not Path(source).is_dir():
        return
    for name in _JSON_FILES:
        file = Path(source) / name
        if not file.exists():
            continue
        try:
            content = read_json(file, finite=False)  # time_step_limit of Mamba is infinite
        except (OSError, ValueError) as error:
            raise BaseModelError(
                f"can't load the base model: {file} can't be read as JSON: {error}. Restore or write it again."
            ) from error
        if not isinstance(content, dict):
            raise BaseModelError(
                f"can't load the base model: {file} holds a JSON {type(content).__name__}; settings are one object."
            )


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
