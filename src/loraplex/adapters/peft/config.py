"""PEFT's adapter_config.json to LoraConfig and back; what can't be honoured exactly is refused by name."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.contents import ContentsConfig, Start
from loraplex.adapters.patterns import find_matches
from loraplex.adapters.peft.known_settings import HARMLESS, METADATA, SWITCHES, switch
from loraplex.errors import AdapterFormatError, ConfigError, UnsupportedAdapterError
from loraplex.json_files import read_object
from loraplex.validation import quoted

CONFIG_FILE = "adapter_config.json"

logger = logging.getLogger(__name__)

# Settings that change what is computed in ways loraplex doesn't reproduce, and what to do about them.
_REFUSED = {
    "arrow_config": "it routes between the adapters beside it; load the folder above with load_mixture",
    "kasa_config": "it removes singular values from the base model's weights; merge it with PEFT instead",
    "layer_replication": "it changes the layers of the base model; load a base model that has these layers",
    "megatron_config": "it is for Megatron's parallel layers; convert it to a plain LoRA",
    "use_bdlora": "its factors are block-diagonal; write them out as full matrices",
    "use_qalora": "its factors belong to pooled inputs of a quantized base; train with use_qalora=False",
}

# Settings by which an adapter brings more than factors: `load_adapter` honours them, other readers refuse them.
_CONTENTS = {
    "bias": "biases of the base model come with it; train with bias='none'",
    "lora_bias": "its lora_B has a bias; train with lora_bias=False",
    "modules_to_save": "whole modules come with it; adapt them by LoRA (target_modules) instead",
    "trainable_token_indices": "rows of the embedding come with it; adapt the embedding by LoRA instead",
}

_INITS_KEEPING_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")
_INITS_CHANGING_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_EMBEDDING_NAMES = ("embed_tokens", "lm_head")  # that PEFT's weight tying looks for

# LoraConfig's fields that stand in the file under the same name and type.
_COPIED = ("r", "lora_alpha", "use_rslora", "use_dora", "lora_dropout", "fan_in_fan_out", "task_type")
_SEQUENCES = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "alora_invocation_tokens",
    "target_parameters",
)
_PATTERNS = ("rank_pattern", "alpha_pattern")


def read_peft_config(folder: Path, *, ignore_unknown: bool = False, contents: bool = False) -> LoraConfig:
    """Read and check `folder`/adapter_config.json. `ignore_unknown` leaves out settings that aren't known, with a
    warning; they may change what the adapter computes. target_modules may be None (see default_targets.py). An adapter
    of more than factors is refused without `contents`.

    Raises UnsupportedAdapterError (a setting that can't be honoured exactly) and AdapterFormatError (not
    valid JSON, or values that PEFT would refuse too).
    """
    file = folder / CONFIG_FILE
    settings = read_object(file, AdapterFormatError)
    try:
        _refuse_unsupported(settings, file)
        _check_unknown(settings, file, ignore_unknown)
        _refuse_changed_base(settings.get("init_lora_weights", True), file, contents=contents)
        if not contents:
            _refuse_contents(settings, file)
        return LoraConfig(**_known_fields(settings))
    except (ConfigError, TypeError) as error:
        raise AdapterFormatError(f"{file}: {error}") from error


def peft_settings(config: LoraConfig) -> dict[str, Any]:
    """`config` as the content of an adapter_config.json."""
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": config.base_model_name_or_path,
    }
    settings |= {name: getattr(config, name) for name in _COPIED}
    for name in _SEQUENCES:
        value = getattr(config, name)
        settings[name] = list(value) if isinstance(value, tuple) else value
    settings |= {name: dict(getattr(config, name)) for name in _PATTERNS}  # in order: the first match counts
    return settings | {
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_bias": False,
        "modules_to_save": None,
    }


def _refuse_unsupported(settings: Mapping[str, Any], file: Path) -> None:
    method = settings.get("peft_type")
    if method == "XLORA":
        raise UnsupportedAdapterError(
            f"{file}: peft_type 'XLORA' is that of a mixture, not of an adapter. Load it with load_mixture "
            "(--load-mixture NAME=FOLDER)."
        )
    if method is None and isinstance(settings.get("lora_parameters"), dict):
        raise UnsupportedAdapterError(
            f"{file} has peft_type None: it is of an MLX adapter. Convert it: loraplex convert {str(file.parent)!r}."
        )
    if method != "LORA":
        raise UnsupportedAdapterError(
            f"{file}: peft_type {quoted(method)} names an unsupported method. Supported: 'LORA', with "
            "rsLoRA, DoRA or aLoRA."
        )
    for name, reason in _REFUSED.items():
        # An empty object switches a variant on with its default values, so only an empty list is 'not set'.
        if settings.get(name) not in (None, False, []):
            raise UnsupportedAdapterError(
                f"{file}: {name} is {quoted(settings[name])}, which can't be honoured: {reason}."
            )
    _refuse_tied_adapters(settings, file)


def _check_unknown(settings: Mapping[str, Any], file: Path, ignore_unknown: bool) -> None:
    """Refuse settings that aren't known and have a value, unless they are to be ignored; warn about all others."""
    known = HARMLESS | METADATA | _REFUSED.keys() | _CONTENTS.keys() | {*_COPIED, *_SEQUENCES, *_PATTERNS}
    known |= {"base_model_name_or_path", "init_lora_weights", "ensure_weight_tying"}
    unknown = {name: value for name, value in settings.items() if name not in known}
    set_ones = {name: value for name, value in unknown.items() if value}
    if set_ones and not ignore_unknown:
        raise UnsupportedAdapterError(
            f"{file}: unknown settings {quoted(set_ones)}. They may change what the adapter computes, so they are "
            "not ignored. If they don't, remove them, or pass ignore_unknown=True (--ignore-unknown). Known are those "
            "of LoraConfig in PEFT 0.21."
        )
    if unknown:
        logger.warning("%s: settings that are not known were ignored: %s", file, quoted(unknown))


def _refuse_contents(settings: Mapping[str, Any], file: Path) -> None:
    """Refuse an adapter of more than factors, for those who can do nothing with the rest."""
    for name, reason in _CONTENTS.items():
        if settings.get(name) not in (None, False, [], "none"):
            raise UnsupportedAdapterError(
                f"{file}: {name} is {quoted(settings[name])}, which can be served (load_adapter) but not used here: "
                f"{reason}."
            )


def _refuse_changed_base(init: object, file: Path, *, contents: bool) -> None:
    """Refuse inits that take the adapter's start out of the base: PEFT repeats that at every load.

    With `contents`, those whose start can be told from the base's weights alone are not refused.
    """
    name = init.lower() if isinstance(init, str) else init
    if name is None or name in (False, True, *_INITS_KEEPING_THE_BASE):
        return
    if contents and _start(init) != "nothing":
        return
    changes = isinstance(name, str) and name.startswith(_INITS_CHANGING_THE_BASE)
    what = "changes the base model's weights" if changes else "is unknown"
    raise UnsupportedAdapterError(
        f"{file}: init_lora_weights is {quoted(init)}, which {what}. Supported: true, false, "
        f"{', '.join(map(repr, _INITS_KEEPING_THE_BASE))}. Convert to a plain LoRA: PEFT's "
        "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
    )


def _refuse_tied_adapters(settings: Mapping[str, Any], file: Path) -> None:
    if not settings.get("ensure_weight_tying"):
        return
    targets = settings.get("target_modules") or []
    if isinstance(targets, str):
        tied = list(find_matches("target_modules", targets, _EMBEDDING_NAMES))
    else:
        tied = [name for name in targets if str(name).split(".")[-1] in _EMBEDDING_NAMES]
    if tied:
        raise UnsupportedAdapterError(
            f"{file}: ensure_weight_tying is true and target_modules matches {tied}: PEFT then shares one "
            "adapter between embedding and output layer. Supported: false, with one adapter for each."
        )


def _known_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of LoraConfig; a setting that is absent takes LoraConfig's default, which is PEFT's."""
    fields = {name: settings[name] for name in (*_COPIED, "base_model_name_or_path") if name in settings}
    fields |= {name: switch(fields[name]) for name in SWITCHES if name in fields}
    for name in _SEQUENCES:
        value = settings.get(name)
        if isinstance(value, list):
            fields[name] = tuple(value)
        elif name == "layers_to_transform" and isinstance(value, int):
            fields[name] = (value,)
        elif name == "layers_pattern" and isinstance(value, str):
            fields[name] = (value,) if value else None
        elif value is not None:
            fields[name] = value
    fields |= {name: settings.get(name) or {} for name in _PATTERNS}
    if not fields.get("alora_invocation_tokens"):
        fields["alora_invocation_tokens"] = None  # PEFT: an empty list is plain LoRA
    return fields | {"contents": _contents(settings)}


def _start(init: object) -> Start:
    """The start that an init takes out of the base, where everybody who knows the base can tell it."""
    if init == "pissa":  # "pissa_niter_16" draws random numbers
        return "pissa"
    return "olora" if isinstance(init, str) and init.lower() == "olora" else "nothing"


def _contents(settings: Mapping[str, Any]) -> ContentsConfig:
    """What comes beside the factors. Raises ConfigError."""
    saved = settings.get("modules_to_save") or ()
    rows = settings.get("trainable_token_indices") or None
    if isinstance(rows, list):
        rows = {"": tuple(rows)}  # of the input embedding
    elif isinstance(rows, dict):
        rows = {name: tuple(tokens) if isinstance(tokens, list) else tokens for name, tokens in rows.items()}
    elif rows is not None:
        raise ConfigError(
            f"trainable_token_indices is {quoted(rows)}; it must be a list of token ids, or lists by name."
        )
    if not isinstance(saved, (list, tuple)):
        raise ConfigError(f"modules_to_save is {quoted(saved)}; it must be a list of names.")
    return ContentsConfig(
        bias=settings.get("bias") or "none",
        modules_to_save=tuple(saved),
        token_rows=rows,
        ensure_weight_tying=bool(settings.get("ensure_weight_tying")),
        lora_bias=settings.get("lora_bias") or False,
        start=_start(settings.get("init_lora_weights", True)),
    )
