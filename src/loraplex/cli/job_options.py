"""Settings of many jobs from a TOML file and from options: one value for all jobs, or NAME=VALUE for one."""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraplex.adapters.config import ALL_LINEAR, LoraConfig
from loraplex.cli.options import read_numbers
from loraplex.errors import ConfigError
from loraplex.json_files import MAX_SETTINGS_BYTES, read_text
from loraplex.residual.modules import ResidualConfig
from loraplex.residual.positions import parse_positions
from loraplex.residual.reft import ReftConfig
from loraplex.training import AdapterJob
from loraplex.training.core.config import compose
from loraplex.validation import quoted

Settings = dict[str, Any]


def _targets(text: str) -> tuple[str, ...] | str:
    return text if text == ALL_LINEAR else tuple(part.strip() for part in text.split(",") if part.strip())


def _optional_number(text: str) -> float | None:
    return None if text == "none" else float(text)


def _optional_whole(text: str) -> int | None:
    return None if text == "none" else int(text)


def _gates(text: str) -> float | str:
    return text if text == "dropout" else float(text)


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"{text[:100]!r} is neither true nor false")
    return text == "true"


def _members(text: str) -> list[tuple[str, float]]:
    """ "a+b:0.5" is the link of the folders a, with weight 1, and b."""
    pairs = [part.rpartition(":") if ":" in part else (part, "", "1") for part in text.split("+")]
    return [(folder, float(weight)) for folder, _, weight in pairs]


# How each setting is read from an option; under the same names they stand in the TOML file.
READERS: Mapping[str, Callable[[str], Any]] = {
    "data": str,
    "eval_data": str,
    "kind": str,
    "layers": read_numbers,
    "positions": str,
    "rank": int,
    "alpha": float,
    "targets": _targets,
    "dropout": float,
    "learning_rate": float,
    "schedule": str,
    "warmup_steps": int,
    "weight_decay": float,
    "max_grad_norm": _optional_number,
    "steps": int,
    "epochs": int,
    "batch_size": int,
    "gradient_accumulation": int,
    "seed": int,
    "max_length": int,
    "patience": _optional_whole,
    "eval_every": int,
    "eval_fraction": float,
    "eval_records": _optional_whole,
    "init_from": str,
    "after": _members,
    "gates_before_user": _gates,
    "dora": _flag,
    "rslora": _flag,
    "start": str,
    "lora_plus_ratio": float,
    "loss": str,
    "dpo_beta": float,
    "turns": str,
    "keep_best": _flag,
    "best_by": str,
}
LISTS = ("layers", "targets", "after")  # settings that files may give as lists
_KINDS: Mapping[Callable[[str], Any], str] = {
    str: "a text",
    _flag: "true or false",
    int: "a whole number",
    _optional_whole: "a whole number or none",
    _optional_number: "a number or none",
    read_numbers: "layer numbers such as 0,8-10",
    _members: "folders such as a+b:0.5",
    _gates: "a number from 0 to 1 or dropout",
}
DEFAULTS: Settings = {"kind": "lora"}
_RANKS = {"lora": 16, "residual": 16, "loreft": 4}
_TARGETS = "q_proj,k_proj,v_proj,o_proj"
# Settings of the adapter, not of the job; by kind, those that it has.
_ADAPTER = ("kind", "rank", "alpha", "targets", "dropout", "layers", "positions", "dora", "rslora")
_HAS: Mapping[str, tuple[str, ...]] = {
    "lora": ("kind", "rank", "alpha", "targets", "dropout", "dora", "rslora"),
    "residual": ("kind", "rank", "alpha", "layers"),
    "loreft": ("kind", "rank", "layers", "positions"),
}


def read_job_file(path: Path) -> dict[str, Settings]:
    """By job, the settings of a TOML file: those of [defaults], then those of [jobs.NAME].

    Raises ConfigError.
    """
    try:
        content = tomllib.loads(read_text(path, MAX_SETTINGS_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"the file of jobs {str(path)!r} can't be read as TOML: {error}.") from error
    unknown = content.keys() - {"defaults", "jobs"}
    if unknown or not isinstance(content.get("jobs"), dict):
        raise ConfigError(
            f"{path} has the tables {sorted(content)}; it needs [jobs.NAME] for each job and may have [defaults]."
        )
    defaults = _known(content.get("defaults", {}), f"{path}: [defaults]")
    return {name: defaults | _known(job, f"{path}: [jobs.{name}]") for name, job in content["jobs"].items()}


def merge_options(from_file: Mapping[str, Settings], options: Mapping[str, Sequence[str]]) -> dict[str, Settings]:
    """Every job's settings: the file's, then the options'. Raises ConfigError.

    The jobs are those of the file and those that --data names.
    """
    jobs = {name: dict(settings) for name, settings in from_file.items()}
    for value in options.get("data", ()):
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"--data is {value!r}; write NAME=FILE, for example --data protein=protein.jsonl.")
        if jobs.setdefault(name, {}).get("data") is not None and name not in from_file:
            raise ConfigError(f"--data names the job {name!r} twice; give each adapter one file.")
        jobs[name]["data"] = path
    if not jobs:
        raise ConfigError("there is nothing to train: give --data NAME=FILE for each adapter, or --config FILE.")
    for setting, values in options.items():
        if setting != "data":
            _apply(jobs, setting, values)
    return jobs


def make_job(name: str, settings: Settings, base_model: str) -> AdapterJob:
    """An AdapterJob from settings under the options' names. Raises ConfigError."""
    adapter = _adapter(name, DEFAULTS | settings, base_model)
    settings = {key: value for key, value in settings.items() if key not in _ADAPTER} | adapter
    if "steps" in settings:
        settings["max_steps"] = settings.pop("steps")
    elif "epochs" not in settings:
        settings["max_steps"] = 300
    if "data" not in settings:
        raise ConfigError(f"job {name!r} has no data; add --data {name}=FILE, or data = 'FILE' to its table.")
    return compose(AdapterJob, {"name": name, **settings}, f"job {name!r}")


def _adapter(name: str, settings: Settings, base_model: str) -> Settings:
    """The job's LoraConfig, ResidualConfig or ReftConfig. Raises ConfigError for settings of another kind."""
    kind = settings["kind"]
    if kind not in _HAS:
        raise ConfigError(f"job {name!r}: kind is {kind!r}; choose one of {sorted(_HAS)}.")
    others = [setting for setting in _ADAPTER if setting in settings and setting not in _HAS[kind]]
    if others:
        raise ConfigError(f"job {name!r} trains a {kind}, which has no {others}. Leave them out, or set another kind.")
    rank = settings.get("rank", _RANKS[kind])
    if kind == "loreft":
        positions = parse_positions(settings.get("positions", "f7+l7"))
        return {"reft": ReftConfig(r=rank, layers=_as_tuple(settings.get("layers")), positions=positions)}
    alpha = settings.get("alpha", 2 * rank)
    if kind == "residual":
        return {"residual": ResidualConfig(r=rank, alpha=alpha, layers=_as_tuple(settings.get("layers")))}
    targets = settings.get("targets", _TARGETS)
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=_targets(targets) if isinstance(targets, str) else _as_tuple(targets),
        lora_dropout=settings.get("dropout", 0.0),
        use_dora=settings.get("dora", False),
        use_rslora=settings.get("rslora", False),
        base_model_name_or_path=base_model,
    )
    return {"lora": lora}


def _as_tuple(value: Any) -> Any:
    """TOML's lists as tuples; what is none is for the configuration to refuse."""
    return tuple(value) if isinstance(value, list) else value


def _apply(jobs: dict[str, Settings], setting: str, values: Sequence[str]) -> None:
    """First what holds for all jobs, then what names one."""
    option = "--" + setting.replace("_", "-")
    also = f", or NAME={kind_of(setting)}"
    for value in sorted(values, key=lambda value: "=" in value):
        name, equals, text = value.partition("=")
        if equals and name not in jobs:
            raise ConfigError(f"{option} {value!r} names the job {name!r}, but the jobs are {sorted(jobs)}.")
        parsed = _read_text(option, setting, text if equals else value, also)
        for job in [name] if equals else jobs:
            jobs[job][setting] = parsed


def _read_text(where: str, setting: str, text: str, also: str = "") -> Any:
    try:
        return READERS[setting](text)
    except ValueError:
        raise ConfigError(f"{where} is {quoted(text)}; it must be {kind_of(setting)}{also}.") from None


def kind_of(setting: str) -> str:
    """What a setting must be."""
    return _KINDS.get(READERS[setting], "a number")


def _known(settings: Settings, where: str) -> Settings:
    """A table's settings, its texts read as the options are. Raises ConfigError."""
    unknown = sorted(settings.keys() - READERS.keys())
    if unknown:
        raise ConfigError(f"{where} has the unknown settings {unknown}; possible are {sorted(READERS)}.")
    return {name: _read_value(f"{where} {name}", name, value) for name, value in settings.items()}


def _read_value(where: str, setting: str, value: Any) -> Any:
    if isinstance(value, str):
        return _read_text(where, setting, value)
    wanted = {str: str, _flag: bool}.get(READERS[setting])
    if wanted is not None and not isinstance(value, wanted):
        raise ConfigError(f"{where} is {quoted(value)}; it must be {kind_of(setting)}.")
    return value  # a number or a list, which is for the configuration to check
