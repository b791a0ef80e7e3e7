"""What a model's positions make of how long a sequence is: longrope and dynamic NTK change their frequencies with it.

transformers takes the length from the largest position of a forward pass: a prompt's tokens get that of the whole
prompt, and each token after it its own position + 1. Keys stay in the cache as they were rotated. So a token's length
is max(the first pass's, its position + 1), however a packed pass cuts the prompt, and whoever shares that pass.
"""

from dataclasses import dataclass

from loraplex.engine.kv.sequence_kv import ExtraKey


@dataclass(frozen=True, kw_only=True)
class LengthRule:
    """When positions change with the length of a sequence, and what of it keys and values depend on."""

    threshold: int | None = None  # tokens, from which on they do; None: never
    is_step: bool = True  # they change there once; else with every further token
    # `generate` computes the whole sequence anew in the step in which it outgrows the threshold (Phi-3).
    begins_anew: bool = False

    def first_length(self, num_prompt: int, num_tokens: int) -> int:
        """The length in the first pass of a sequence that has `num_tokens` now."""
        outgrown = self.begins_anew and self.threshold is not None and num_prompt <= self.threshold < num_tokens
        return num_tokens if outgrown else num_prompt

    def keys(self, first_length: int) -> list[ExtraKey]:
        """What keys and values depend on besides the tokens."""
        if self.threshold is None or first_length <= self.threshold:
            return []
        return [ExtraKey(identity=("length", 0 if self.is_step else first_length))]
