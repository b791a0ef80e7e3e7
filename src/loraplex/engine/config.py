"""The engine's settings."""

from dataclasses import dataclass

from loraplex.errors import ConfigError
from loraplex.models.auto.selection import DEFAULT_FLOOR, check_floor

_COUNTS = (
    *("max_running", "max_step_tokens", "max_waiting", "cache_bytes", "block_tokens", "fair_tokens"),
    *("max_images", "max_image_pixels"),
)
_ON_FAULT = ("restart", "exit")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How much runs at once and what is kept."""

    max_running: int = 64  # sequences that share steps; the others wait
    # Of one forward pass: a longer prompt is read in chunks beside the others' decoding. None: as few as read prompts
    # at nearly the best speed of this machine, which is measured when an engine starts with a model for the first time.
    max_step_tokens: int | None = None
    max_waiting: int = 100_000  # requests; more are refused
    cache_bytes: int = 2**30  # for keys, values and (up to half of it) states; touched only as they are needed
    block_tokens: int = 16  # tokens that are allocated, shared and evicted together
    prefix_cache: bool = True  # keep keys and values of finished requests for later ones that begin alike
    fair_tokens: int = 256  # by how many tokens one choice of adapters may get ahead of another that waits
    draft: bool = True  # run a mixture's scaling pass for the token that it expects next, beside the main pass
    batch_invariant: bool = False  # a sequence's bits don't depend on how many tokens share its steps
    auto_floor: float = DEFAULT_FLOOR  # the least score (-1 to 1) with which "auto" chooses an adapter, not the base
    cuda_graphs: bool = True  # record the steps of decoding on a GPU and replay them; elsewhere without effect
    max_length: int | None = None  # tokens of prompt and answer; None: what the base model was made for
    max_images: int = 16  # of one request
    max_image_pixels: int = 2**25  # of a request's images together, before any is decoded
    on_fault: str = "restart"  # what follows an error outside of the requests' own work; "exit" ends the process
    max_restarts: int = 3  # in any restart_window_s; with one fault more the engine stops for good
    restart_window_s: float = 600.0

    def __post_init__(self) -> None:
        for option in _COUNTS:
            value = getattr(self, option)
            if value is None and option == "max_step_tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{option} is {value!r}; it must be a whole number of at least 1.")
        for option in ("prefix_cache", "draft", "batch_invariant", "cuda_graphs"):
            if not isinstance(getattr(self, option), bool):
                raise ConfigError(f"{option} is {getattr(self, option)!r}; it must be True or False.")
        check_floor(self.auto_floor)
        if self.on_fault not in _ON_FAULT:
            raise ConfigError(f"on_fault is {self.on_fault!r}; it must be one of {', '.join(_ON_FAULT)}.")
        if isinstance(self.max_restarts, bool) or not isinstance(self.max_restarts, int) or self.max_restarts < 0:
            raise ConfigError(f"max_restarts is {self.max_restarts!r}; it must be a whole number of at least 0.")
        window = self.restart_window_s
        if isinstance(window, bool) or not isinstance(window, int | float) or not 0 < window < float("inf"):
            raise ConfigError(f"restart_window_s is {window!r}; it must be above 0 and finite.")
        if self.max_length is not None and (not isinstance(self.max_length, int) or self.max_length < 2):
            raise ConfigError(
                f"max_length is {self.max_length!r}; it must be at least 2 (a prompt token and a new one)."
            )
