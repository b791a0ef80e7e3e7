"""How a call runs its mixtures."""

from dataclasses import dataclass

from loraplex.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TwoPassOptions:
    """How the scaling pass is run."""

    draft: bool | None = None  # run it for a drafted next token beside the main pass; None: where that is faster
    refresh: int = 1  # tokens that share one scaling pass's prediction; above 1 is approximate
    collect: bool = False  # keep all scalings

    def __post_init__(self) -> None:
        if isinstance(self.refresh, bool) or not isinstance(self.refresh, int) or self.refresh < 1:
            raise ConfigError(f"refresh is {self.refresh!r}; it must be a whole number, 1 or more (1 is exact).")
        if self.draft and self.refresh > 1:
            raise ConfigError(f"draft=True and refresh={self.refresh} exclude each other. Choose one of them.")
