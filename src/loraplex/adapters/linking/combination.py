"""How several adapters become one: the method and its options, under PEFT's names."""

from dataclasses import dataclass

from loraplex.adapters.config import MAX_RANK
from loraplex.errors import ConfigError
from loraplex.validation import is_finite, is_whole, quoted

# What is done to each adapter's values before they are added (the last column of docs/guides/merging.md).
_PRUNINGS = {"ties": "magnitude", "magnitude_prune": "magnitude", "dare_linear": "random", "dare_ties": "random"}
_SVD = "_svd"
METHODS = ("cat", "linear", "svd", *_PRUNINGS, *(f"{method}{_SVD}" for method in _PRUNINGS))
MAJORITY_SIGNS = ("total", "frequency")
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Combination:
    """A method of `add_weighted_adapter` (PEFT 0.21) with its options. Raises ConfigError for what has no meaning.

    - "cat": the factors side by side, which computes exactly what the link does; ranks add up.
    - "linear": A and B are added each by itself, with the roots of the weights; "ties", "dare_linear", "dare_ties" and
      "magnitude_prune" leave out values of A and B before. All adapters of a module need the same rank.
    - "svd": the closest update of a rank to the link's; "ties_svd" and the others leave out values of the updates
      before, which are formed for that.
    """

    method: str = "cat"
    rank: int | None = None  # of the result, for methods with svd; None: the largest of the adapters
    density: float | None = None  # share of the values that are kept
    majority_sign: str | None = None  # of ties: by the sum of the values (None, "total"), or by their number
    seed: int = 0  # of dare, which leaves out values at random

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"combination {quoted(self.method)} is unknown. Use one of {list(METHODS)}.")
        if self.rank is not None:
            self._check_used("rank", self.has_svd, "the methods with svd")
            if not (is_whole(self.rank) and 1 <= self.rank <= MAX_RANK):
                raise ConfigError(f"rank is {quoted(self.rank)}; it must be a whole number from 1 to {MAX_RANK}.")
        if self.density is not None:
            self._check_used("density", self.pruning is not None, "ties, dare and magnitude_prune")
        elif self.pruning is not None:
            raise ConfigError(
                f"combination {self.method!r} needs a density, the share of values that it keeps, such as 0.5."
            )
        if self.density is not None and not (is_finite(self.density) and 0 < self.density <= 1):
            raise ConfigError(f"density is {quoted(self.density)}; it must be above 0, and 1 at most.")
        if self.majority_sign is not None:
            self._check_used("majority_sign", self.elects_signs, "ties and dare_ties")
            if self.majority_sign not in MAJORITY_SIGNS:
                raise ConfigError(
                    f"majority_sign is {quoted(self.majority_sign)}; it must be one of {list(MAJORITY_SIGNS)}."
                )
        if not (is_whole(self.seed) and 0 <= self.seed <= MAX_SEED):
            raise ConfigError(f"seed is {quoted(self.seed)}; it must be a whole number from 0 to {MAX_SEED}.")

    @property
    def has_svd(self) -> bool:
        """Whether it works on whole updates and takes a rank."""
        return self.method.endswith("svd")

    @property
    def pruning(self) -> str | None:
        """How values are chosen that are left out: "magnitude", "random", or None."""
        return _PRUNINGS.get(self.method.removesuffix(_SVD))

    @property
    def elects_signs(self) -> bool:
        """Whether values count only where their sign is that of the majority (TIES)."""
        return self.method.removesuffix(_SVD) in ("ties", "dare_ties")

    def _check_used(self, option: str, is_used: bool, by: str) -> None:
        if not is_used:
            raise ConfigError(
                f"{option} is {quoted(getattr(self, option))}, but combination {self.method!r} has no use for it, only "
                f"{by}. Leave it out, or choose another combination."
            )
