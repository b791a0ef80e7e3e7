"""`loraplex serve --engine vllm`: vLLM's own server, started with the plugin and loraplex's settings."""

import json
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from loraplex.adapters.peft.config import read_peft_config
from loraplex.errors import ConfigError
from loraplex.extras import require_extra
from loraplex.models.checkpoints.smollm2 import ALIAS, convert_smollm2
from loraplex.residual.format import is_residual_folder
from loraplex.residual.format_settings import read_settings
from loraplex.residual.other_formats.control_vector import is_control_vector
from loraplex.residual.sources import is_residual_source
from loraplex.routers.config import LinearRouterConfig
from loraplex.routers.folder import is_router_folder, read_router_folder
from loraplex.server.settings import ServeConfig
from loraplex.xlora.formats.folders import is_mixture_folder, read_mixture_folder

ADDITIONAL = "--additional-config"
SERVER = "vllm.entrypoints.openai.api_server"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's max_lora_rank is one of these

# loraplex's setting -> vLLM's flag. Those that make the base model and the plugin's options are read below.
_FLAGS = {
    ("model", "served_name"): "--served-model-name",
    ("model", "dtype"): "--dtype",
    ("network", "host"): "--host",
    ("network", "port"): "--port",
    ("network", "tls_certificate"): "--ssl-certfile",
    ("network", "tls_key"): "--ssl-keyfile",
    ("network", "tls_client_ca"): "--ssl-ca-certs",
    ("engine", "max_running"): "--max-num-seqs",
    ("engine", "max_step_tokens"): "--max-num-batched-tokens",
    ("engine", "max_length"): "--max-model-len",
}
_ALWAYS = {("model", "dtype"), ("network", "host"), ("network", "port")}  # vLLM's defaults are others
_READ = {("model", name) for name in ("model", "adapters", "mixtures", "watch", "generation_config")} | {
    ("access", "allow_anonymous")
}


def serve_with_vllm(settings: ServeConfig, extra: str) -> None:
    """Become vLLM's OpenAI server. Raises MissingExtraError; ConfigError for settings that vLLM has no place for."""
    require_extra("vllm", "--engine vllm (without a GPU: docs/vllm.md)")
    command = [sys.executable, "-m", SERVER, *vllm_arguments(settings, extra)]
    # The server asks its resolvers only with the first, and has the plugin's route only with the second.
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    variables = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_PLUGINS": ",".join({*plugins, "loraplex"})}
    os.execve(sys.executable, command, os.environ | variables)


def vllm_arguments(settings: ServeConfig, extra: str = "") -> list[str]:
    """The command line of vLLM's server; what is in `extra` comes last, so it counts.

    The plugin's options in an --additional-config of `extra` are put over those that are found here.
    """
    _refuse_others(settings)
    model = settings.model
    named = {**model.adapters, **model.mixtures}
    folders = [Path(folder) for folder in named.values()] + _subfolders(model.watch)
    options: dict[str, Any] = {"adapters": named, "mixtures": any(map(is_mixture_folder, folders))}
    options["routers"] = any(map(is_router_folder, folders))
    residuals = [folder for folder in folders if is_residual_source(folder)]
    if residuals:
        options |= {"residuals": True, "linked": int(any(map(_is_linked, residuals)))}
    if model.watch:
        options["folder"] = model.watch
    additional, more = _additional_config(shlex.split(extra))
    additional["loraplex"] = options | additional.get("loraplex", {})
    base = str(convert_smollm2()) if model.model == ALIAS else model.model
    arguments = ["--model", base, "--enable-lora", "--max-lora-rank", str(rank_for(folders)), "--max-loras", "8"]
    arguments += ["--max-cpu-loras", "64", ADDITIONAL, json.dumps(additional)]
    if model.model == ALIAS and not model.served_name:
        arguments += ["--served-model-name", ALIAS]
    if residuals or additional["loraplex"].get("attention"):
        arguments += ["--enforce-eager"]  # hooks add them, which recorded passes leave out
    if model.generation_config == "none":
        arguments += ["--generation-config", "vllm"]
    for section, name in _changed(settings) | _ALWAYS:
        if (section, name) in _FLAGS:
            arguments += [_FLAGS[section, name], str(getattr(getattr(settings, section), name))]
    return arguments + more


def _additional_config(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The object that vLLM's --additional-config has among arguments, and the others. Raises ConfigError."""
    if ADDITIONAL not in arguments:
        return {}, arguments
    place = arguments.index(ADDITIONAL)
    try:
        content = json.loads(arguments[place + 1])
    except (IndexError, ValueError) as error:
        raise ConfigError(f"{ADDITIONAL} in --vllm-args has no JSON behind it: {error}.") from None
    if not isinstance(content, dict) or not isinstance(content.get("loraplex", {}), dict):
        raise ConfigError(f"{ADDITIONAL} in --vllm-args is {content!r}; it must be an object, and so its loraplex.")
    return content, arguments[:place] + arguments[place + 2 :]


def rank_for(folders: list[Path]) -> int:
    """The least max_lora_rank for each of these adapters and mixtures by itself; links may need more."""
    rank = max([0, *map(_rank, folders)])
    for allowed in RANKS:
        if rank <= allowed:
            return allowed
    raise ConfigError(f"an adapter or a mixture's experts have rank {rank} together; vLLM's largest is {RANKS[-1]}.")


def _is_linked(residual: Path) -> bool:
    return is_residual_folder(residual) and read_settings(residual).kind == "linked"


def _rank(folder: Path) -> int:
    if is_residual_source(folder):
        return 0
    if is_mixture_folder(folder):
        return sum(_rank(Path(expert)) for expert in read_mixture_folder(folder).experts.values())
    if is_router_folder(folder):
        mixture = read_router_folder(folder)
        logits = len(mixture.experts) if isinstance(mixture.config, LinearRouterConfig) else 0  # a rank each
        return sum(map(_rank, mixture.experts.values())) + logits
    config = read_peft_config(folder)
    return max(config.r, *config.rank_pattern.values()) if config.rank_pattern else config.r


def _subfolders(root: str) -> list[Path]:
    """The adapters, mixtures and residuals below a folder; a mixture's experts are its own."""
    found: list[Path] = []
    for parent, names, files in os.walk(root) if root else ():
        names[:] = [name for name in names if not name.startswith(".")]
        found += [file for name in files if is_control_vector(file := Path(parent, name))]
        kinds = {"adapter_config.json", "xlora_config.json", "residual_config.json"}
        is_folder = kinds & set(files) or is_router_folder(Path(parent))
        if is_folder and parent != root:
            found.append(Path(parent))
            names.clear()
    return sorted(found)


def _changed(settings: ServeConfig) -> set[tuple[str, str]]:
    """The settings that aren't their defaults, by section and name."""
    defaults = ServeConfig()
    return {
        (section.name, option.name)
        for section in fields(settings)
        for option in fields(getattr(settings, section.name))
        if _plain(getattr(getattr(settings, section.name), option.name))
        != _plain(getattr(getattr(defaults, section.name), option.name))
    }


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _refuse_others(settings: ServeConfig) -> None:
    others = sorted(f"{section}.{name}" for section, name in _changed(settings) - set(_FLAGS) - _READ)
    if others:
        raise ConfigError(
            f"{', '.join(others)}: vLLM's server has no such setting. Leave it out, or give one of vLLM's own in "
            "--vllm-args (an API key, for example: --vllm-args '--api-key ...')."
        )
