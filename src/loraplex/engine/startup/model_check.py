"""Whether packed passes give what the base model gives by itself, module by module.

Every module that has parts is given the input that it had in the model's own pass, so that what is compared is what
this module makes of its input, and what stands between it and the modules before: rounding doesn't add up over layers,
and a bound can be near it. How large rounding is, is measured: the model's own pass once more, with every such input
off by its last bit.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from loraplex.engine.startup.trial_passes import TrialPasses, TrialRow
from loraplex.engine.worker.input_batch import current_input_batch
from loraplex.errors import BaseModelError
from loraplex.layers.quantized.kinds import rounds_inputs

# A difference may be this many times what the last bit of an input makes, and this part of a result beside it: sums in
# another order.
_TIMES = 4.0
_FLOOR = {torch.float32: 1e-4, torch.float16: 4e-3}
_LARGEST_FLOOR = 3e-2
# Of tokens outside of attention, this part and two tokens may differ by more.
_CHOSEN_APART = 0.1

Key = tuple[nn.Module, int, str]  # a module, the number of its call in one pass, and which of its tensors
Given = tuple[tuple[Any, ...], dict[str, Any]]


class CacheBehind(DynamicCache):
    """An empty cache that says that it has seen tokens, whose keys and values have left every window."""

    def __init__(self, num_seen: int, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self._num_seen = num_seen

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self._num_seen

    def get_query_offset(self, *args: Any, **kwargs: Any) -> int:
        return self._num_seen

    def get_mask_sizes(self, query_length: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return query_length, self._num_seen


class ModelCheck:
    """Runs the comparison on groups of sequences."""

    def __init__(
        self,
        base: PreTrainedModel,
        attends: Callable[[nn.Module], bool],
        groups: Sequence[Sequence[TrialRow]],
        forget_lengths: Callable[[], None],
    ) -> None:
        """`attends` says which modules are held to the bound at every token; `forget_lengths` is AttentionHooks's."""
        self._base, self._attends, self._groups = base, attends, list(groups)
        self._forget_lengths = forget_lengths
        self._names = {module: name for name, module in base.named_modules() if list(module.children())}
        self._own: dict[int, dict[Key, Tensor]] = {}
        self._errors: dict[Key, dict[int, list[Tensor]]] = {}
        self._noise: dict[Key, list[Tensor]] = {}
        dtype = base.dtype
        self._epsilon = torch.finfo(dtype).eps
        self._floor = _FLOOR.get(dtype, _LARGEST_FLOOR)
        if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            self._floor = _FLOOR[torch.float16]
        if rounds_inputs(base):
            self._floor = _LARGEST_FLOOR

    @torch.inference_mode()
    def run(self, passes: TrialPasses) -> None:
        """Raises BaseModelError."""
        name = type(self._base).__name__
        try:
            for group in range(len(self._groups)):
                if self._can_run(group):
                    self._run_own(group)
                    self._run_noisy(group)
            self._run_packed(passes)
        except BaseModelError:
            raise
        except Exception as error:
            raise BaseModelError(
                f"{name} can't run in packed passes: {type(error).__name__}: {error}. Use MultiLoraModel.generate "
                "for it."
            ) from error
        told = self._difference()
        if told is not None:
            raise BaseModelError(
                f"packed passes of {name} give other values than the model by itself: {told}. So its tokens depend "
                "on something that the engine doesn't know. Use MultiLoraModel.generate for it."
            )

    # Passes

    def _can_run(self, group: int) -> bool:
        """False, and the group is left out, for a model that takes no cache but its own kind."""
        if not self._groups[group][0].is_cached:
            return True
        try:
            self._forward(group)
        except (TypeError, ValueError, AttributeError):
            self._groups[group] = []
        return bool(self._groups[group])

    def _run_own(self, group: int) -> None:
        """The model by itself, keeping what its modules were given and what they made of it."""
        kept = self._own[group] = {}
        shape = self._shape(group)

        def see(key: Key, value: Tensor) -> Tensor:
            kept[key] = value
            return value

        with self._watched(lambda value: value.shape[:2] == shape, see):
            self._forward(group)

    def _run_noisy(self, group: int) -> None:
        """The same, each module being given its input off by its last bit."""
        kept, shape = self._own[group], self._shape(group)
        generator = torch.Generator(self._base.device).manual_seed(0)

        def see(key: Key, value: Tensor) -> Tensor:
            own = kept.get(key)
            if own is None:
                return value
            self._noise.setdefault(key, []).append(_errors(value, own))
            shift = torch.empty(own.shape, device=own.device).uniform_(-1, 1, generator=generator)
            return (own.float() * (1 + self._epsilon * shift)).to(own.dtype)

        with self._watched(lambda value: value.shape[:2] == shape, see):
            self._forward(group)

    def _run_packed(self, passes: TrialPasses) -> None:
        def is_packed(value: Tensor) -> bool:
            batch = current_input_batch()
            return batch is not None and value.shape[:2] == (1, batch.num_tokens)

        def see(key: Key, value: Tensor) -> Tensor:
            places = passes.places
            assert places is not None, "a pass that is no trial ran while the engine starts"
            kept = {group: self._own[group][key] for group in places.groups if key in self._own[group]}
            if len(kept) < len(places.groups):
                return value
            own = places.gather(kept, value.shape[1])
            errors = _errors(value, own)
            for group, (where, _, _) in places.groups.items():
                self._errors.setdefault(key, {}).setdefault(group, []).append(errors[where])
            return own

        with self._watched(is_packed, see):
            passes.run(self._groups, layer_by_layer=True)

    def _forward(self, group: int) -> None:
        rows = self._groups[group]
        self._forget_lengths()
        ids = torch.tensor([row.tokens for row in rows], device=self._base.device)
        if any(row.offset for row in rows):
            positions = torch.arange(ids.shape[1]) + torch.tensor([[row.offset] for row in rows])
            options: dict[str, Any] = {"use_cache": False}
            if rows[0].is_cached:
                options = {"past_key_values": CacheBehind(rows[0].offset, self._base.config), "use_cache": True}
            self._base(input_ids=ids, position_ids=positions.to(ids.device), **options)
        else:
            self._base(input_ids=ids, use_cache=False)

    def _shape(self, group: int) -> tuple[int, int]:
        return len(self._groups[group]), len(self._groups[group][0].tokens)

    @contextmanager
    def _watched(self, is_seen: Callable[[Tensor], bool], see: Callable[[Key, Tensor], Tensor]) -> Iterator[None]:
        """Let `see` have what modules are given, and put what it returns in its place; and have what they return."""
        calls: Counter[nn.Module] = Counter()

        def is_value(value: object) -> bool:
            return isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3 and is_seen(value)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
            if module is self._base:
                calls.clear()
            calls[module] += 1
            named = {str(i): value for i, value in enumerate(args)} | kwargs
            for name, value in named.items():
                if is_value(value):
                    named[name] = see((module, calls[module], f"input {name}"), value)
            return tuple(named[str(i)] for i in range(len(args))), {name: named[name] for name in kwargs}

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            made = output if isinstance(output, (tuple, list)) else [output]
            made = list(output.values()) if isinstance(output, dict) else made
            value = next((value for value in made if is_value(value)), None)
            if value is not None:
                see((module, calls[module], "output"), value)

        handles = []
        for module in self._names:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # What they gave

    def _difference(self) -> str | None:
        """The first difference that rounding doesn't explain, in words."""
        for key, by_group in self._errors.items():
            module = key[0]
            # Where experts are chosen, rounding may choose others for some tokens: attention alone is held at all.
            apart = 0.0 if self._attends(module) else _CHOSEN_APART
            noise = torch.cat(self._noise[key]).nan_to_num(0).quantile(1 - apart) if key in self._noise else 0.0
            bound = _TIMES * float(noise) + self._floor
            for group, errors in ((group, torch.cat(parts)) for group, parts in by_group.items()):
                num_off = int((~(errors <= bound)).sum())
                if num_off > apart * len(errors) + (2 if apart else 0):
                    told = f"is off by up to {errors.max():.1e} of its size at {num_off} of {len(errors)} tokens"
                    return f"{self._named(key)} {told}{self._far(group)}, where rounding is below {bound:.1e}"
        return None

    def _named(self, key: Key) -> str:
        module, _, tensor = key
        return f"the {tensor} of {self._names[module] or 'the model'} ({type(module).__name__})"

    def _far(self, group: int) -> str:
        first = min(row.offset for row in self._groups[group])
        return f" from position {first} on, which EngineConfig.max_length can exclude" if first else ""


def _errors(value: Tensor, own: Tensor) -> Tensor:  # [tokens]
    """How far each token's values are from the model's own, relative to their size; 0 where those are not finite."""
    size = own.float().norm(dim=-1)
    is_finite = size.isfinite()
    typical = size[is_finite].mean() if is_finite.any() else size.new_ones(())
    errors = (value.float() - own.float()).norm(dim=-1) / size.clamp(min=0.3 * float(typical)).clamp(min=1e-30)
    return errors.masked_fill(~is_finite, 0).flatten()
