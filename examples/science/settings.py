"""What a run is made of: one TOML file, checked when it is read."""

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DOMAINS = ("quantum", "materials", "protein", "peptides", "chemistry", "barrier")


class SettingsError(ValueError):
    """The file of settings says something that has no meaning."""


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """Sizes of one domain's held-out sets, in subjects."""

    test: int
    valid: int
    per_group: int = 5  # subjects of a held-out group that are asked about
    largest: int = 200  # subjects of a group that may be held out


@dataclass(frozen=True, kw_only=True)
class ExpertSettings:
    """One domain's expert."""

    steps: int
    shares: Mapping[str, float]  # by task, of the training records
    split: SplitSettings


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """What all experts have in common."""

    rank: int
    targets: tuple[str, ...]
    learning_rate: float
    warmup_steps: int
    batch_size: int
    eval_every: int
    eval_records: int
    max_length: int = 512
    gates_before_user: str = "dropout"
    together: bool = False  # all experts in shared batches, one process, instead of one after the other
    kept_rank: int | None = None  # of what is shipped: the closest update of a lower rank; None keeps all


@dataclass(frozen=True, kw_only=True)
class MixtureSettings:
    """Heads, routers, and experts with them."""

    records: int  # of each domain, and of each mixed form, for training
    valid_records: int
    head_steps: int
    router_steps: int
    joint_steps: int
    head_learning_rate: float
    router_learning_rate: float
    joint_learning_rate: float
    batch_size: int
    eval_every: int
    head_size: int = 256
    top_k: int = 2  # of Arrow and SpectR


@dataclass(frozen=True, kw_only=True)
class AskSettings:
    """How many questions, and how they are answered."""

    questions: int  # of each task at most
    mixed_questions: int
    samples: int  # of a numeric answer; their median is taken
    inverse_targets: int
    temperature: float = 1.0  # of samples
    ablation_questions: int = 100


@dataclass(frozen=True, kw_only=True)
class BaselineSettings:
    """How much the libraries' models may cost."""

    max_rows: int  # of train
    rounds: int  # trees at most; fewer if held-out loss stops falling
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A whole run."""

    output: Path
    subjects: Path | None  # a folder of subjects that is there already; None: made from the packages
    model: str
    dtype: str
    seed: int
    shared: int  # molecules that two domains have in common and neither trains on
    lora: LoraSettings
    mixture: MixtureSettings
    ask: AskSettings
    baselines: BaselineSettings
    experts: Mapping[str, ExpertSettings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [name for name in self.experts if name not in DOMAINS]
        if unknown or not self.experts:
            raise SettingsError(f"experts are {list(self.experts)}; they must be some of {list(DOMAINS)}.")


def read_settings(path: Path) -> Settings:
    """Read a file such as settings.toml. Raises SettingsError with the place of what is wrong."""
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path} is not TOML: {error}.") from error
    experts = {}
    for name, table in content.pop("experts", {}).items():
        table["split"] = _make(SplitSettings, table.get("split", {}), f"{path}: experts.{name}.split")
        experts[name] = _make(ExpertSettings, table, f"{path}: experts.{name}")
    parts = {
        "lora": LoraSettings,
        "mixture": MixtureSettings,
        "ask": AskSettings,
        "baselines": BaselineSettings,
    }
    made = {name: _make(kind, content.pop(name, {}), f"{path}: {name}") for name, kind in parts.items()}
    content["output"] = Path(content.get("output", "runs/science"))
    content["subjects"] = Path(content["subjects"]) if content.get("subjects") else None
    made["lora"] = dataclasses.replace(made["lora"], targets=tuple(made["lora"].targets))
    return _make(Settings, content | made | {"experts": experts}, str(path))


def _make(kind: Any, table: Mapping[str, Any], place: str) -> Any:
    fields = {each.name: each for each in dataclasses.fields(kind)}
    unknown = [name for name in table if name not in fields]
    if unknown:
        raise SettingsError(f"{place} has no setting {unknown[0]!r}. It has {sorted(fields)}.")
    missing = [
        name
        for name, each in fields.items()
        if name not in table and each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise SettingsError(f"{place} lacks {missing}.")
    return kind(**table)
