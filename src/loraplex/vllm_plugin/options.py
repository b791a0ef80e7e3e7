"""What the plugin is asked for: vLLM's `additional_config={"loraplex": {...}}`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from loraplex.adapters.names import check_name
from loraplex.errors import ConfigError, NameFormatError
from loraplex.validation import is_whole

KEY = "loraplex"  # in vLLM's additional_config
MAX_LINKED = 8  # residuals of one link: each has keys and values of its own


@dataclass(frozen=True, kw_only=True)
class PluginOptions:
    """The plugin's options; without the key in `additional_config` it does nothing."""

    folder: str = ""  # its subfolders are adapters and mixtures, named by their path below it
    adapters: Mapping[str, str] = field(default_factory=dict)  # others, name -> folder
    mixtures: bool = False  # serve X-LoRA: every token takes twice the memory for keys and values
    routers: bool = False  # serve mixtures in one pass, whose routers read each layer's input
    max_experts: int = 8  # of one link's mixtures together
    residuals: bool = False  # serve vectors and low-rank interventions on blocks, their attention and feed-forward
    linked: int = 0  # linked residuals that a link may have: each takes a cache for keys and values in its layers
    attention: bool = False  # steer and capture attention: a cache for keys and values in its layers
    attention_layers: Sequence[int] | None = None  # where linked residuals, steering and captures may act; None: all
    any_path: bool | None = None  # load from other folders too; None: only where no folder or adapter is given

    def __post_init__(self) -> None:
        kinds = {"folder": str, "adapters": Mapping, "mixtures": bool, "routers": bool, "residuals": bool}
        kinds["attention"] = bool
        for option, kind in kinds.items():
            if not isinstance(getattr(self, option), kind):
                raise ConfigError(f"{KEY}.{option} is {getattr(self, option)!r}; it must be a {kind.__name__}.")
        if self.any_path not in (None, True, False):
            raise ConfigError(f"{KEY}.any_path is {self.any_path!r}; it must be true, false or null.")
        if not isinstance(self.max_experts, int) or isinstance(self.max_experts, bool) or self.max_experts < 1:
            raise ConfigError(f"{KEY}.max_experts is {self.max_experts!r}; it must be a whole number, 1 or more.")
        if not is_whole(self.linked) or not 0 <= self.linked <= MAX_LINKED:
            raise ConfigError(f"{KEY}.linked is {self.linked!r}; it must be a whole number, 0 to {MAX_LINKED}.")
        if self.attention_layers is not None:
            object.__setattr__(self, "attention_layers", _layers(self.attention_layers))
        for name, folder in self.adapters.items():
            try:
                check_name(name)
            except NameFormatError as error:
                raise ConfigError(f"{KEY}.adapters: {error}") from None
            if not isinstance(folder, str) or not folder:
                raise ConfigError(f"{KEY}.adapters[{name!r}] is {folder!r}; it must be a folder.")

    @property
    def has_residuals(self) -> bool:
        """Whether links may name residuals of some kind."""
        return self.residuals or self.linked > 0

    @property
    def asked_for(self) -> str:
        """What is served besides links of adapters, for messages; empty: nothing."""
        kinds = {"mixtures": self.mixtures or self.routers, "residuals": self.has_residuals}
        kinds["steering and captures"] = self.attention
        return " and ".join(kind for kind, is_on in kinds.items() if is_on)

    @property
    def needs_attention(self) -> bool:
        """Whether attention layers must be of the kind that is known."""
        return self.mixtures or self.has_residuals or self.attention

    @property
    def allows_any_path(self) -> bool:
        """Whether a request may name a folder outside of `folder` and `adapters`."""
        return not (self.folder or self.adapters) if self.any_path is None else self.any_path


def options_from(additional_config: Any) -> PluginOptions | None:
    """The plugin's options in vLLM's `additional_config`; None: the plugin isn't asked for."""
    if not isinstance(additional_config, Mapping) or KEY not in additional_config:
        return None
    given = additional_config[KEY]
    if not isinstance(given, Mapping):
        raise ConfigError(f"additional_config[{KEY!r}] is {given!r}; it must be an object with options, or {{}}.")
    known = [option.name for option in fields(PluginOptions)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(f"additional_config[{KEY!r}] has unknown options {unknown}. Known: {known}.")
    return PluginOptions(**given)


def _layers(layers: object) -> tuple[int, ...]:
    """Raise ConfigError unless these are different layer numbers."""
    if not isinstance(layers, list | tuple) or not layers or not all(is_whole(n) and n >= 0 for n in layers):
        raise ConfigError(
            f"{KEY}.attention_layers is {layers!r}; it must be a list of layer numbers, counted from 0, or null."
        )
    if len(set(layers)) != len(layers):
        raise ConfigError(f"{KEY}.attention_layers is {layers!r}, which names a layer twice.")
    return tuple(layers)
