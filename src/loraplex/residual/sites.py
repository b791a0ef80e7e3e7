"""The blocks of a base model and what is in them: where interventions act, and the hooks that let them."""

import threading
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from loraplex.errors import BaseModelError
from loraplex.layers.attention.check import run_plain
from loraplex.residual.intervention_pass import current_interventions
from loraplex.residual.reft import Site

# What the modules of these sites are called in transformers' blocks.
_NAMES: dict[Site, tuple[str, ...]] = {
    "attention": ("self_attn", "attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
}

# By module of a block, or block, that is hooked: its block's number.
_numbers: "WeakKeyDictionary[nn.Module, int]" = WeakKeyDictionary()


def block_number(module: nn.Module) -> int | None:
    """The number of a block, counted from 0; None for one of a model without interventions."""
    return _numbers.get(module)


class BlockSites:
    """A base model whose blocks, and linear modules, can go through the current interventions.

    Modules get hooks when something acts on them for the first time, and keep them until `detach`.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        """Raises BaseModelError for a model whose blocks aren't known."""
        self._base = base
        self._handles: dict[object, RemovableHandle] = {}
        self._lock = threading.Lock()
        self.hidden_size = int(base.config.get_text_config(decoder=True).hidden_size)
        self.blocks, self._states = _find_blocks(base, self.hidden_size)
        for number, block in enumerate(self.blocks):
            _numbers[block] = number

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def module(self, site: Site, number: int) -> nn.Module | None:
        """What puts out the hidden states of a site; None where the block has no such part."""
        block = self.blocks[number]
        if site == "block":
            return block
        return next((part for name in _NAMES[site] if (part := getattr(block, name, None)) is not None), None)

    def has(self, site: Site, number: int) -> bool:
        """Whether a block has a module at a site that puts out hidden states."""
        return self.module(site, number) in self._states

    def hook_sites(self, keys: Iterable[tuple[Site, int]]) -> None:
        """Let interventions act at some sites."""
        with self._lock:
            for site, number in keys:
                if (site, number) in self._handles:
                    continue
                module = self.module(site, number)
                assert module is not None, f"block {number} was checked to have the site {site!r}"
                self._handles[site, number] = module.register_forward_hook(SiteHook(site, number))

    def hook_gates(self, inputs: Iterable[str], outputs: Iterable[str]) -> None:
        """Let gates act on what linear modules read and make."""
        with self._lock:
            for path in inputs:
                if ("in", path) not in self._handles:
                    module = self._base.get_submodule(path)
                    self._handles["in", path] = module.register_forward_pre_hook(InputGateHook(path))
            for path in outputs:
                module = self._base.get_submodule(path)
                if ("out", path) not in self._handles:
                    self._handles["out", path] = module.register_forward_hook(OutputGateHook(path))
                # Behind the hooks of adapters, whichever came first: a gate acts on what they all make.
                hooks, own = module._forward_hooks, self._handles["out", path].id
                if list(hooks)[-1] != own:
                    hooks[own] = hooks.pop(own)

    def detach(self) -> None:
        """Give the base model back as it was."""
        with self._lock:
            for handle in self._handles.values():
                handle.remove()
            self._handles = {}
            for block in self.blocks:
                _numbers.pop(block, None)


class SiteHook:
    """A forward hook that lets interventions change a module's hidden states."""

    def __init__(self, site: Site, number: int) -> None:
        self._site, self._number = site, number

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        current = current_interventions()
        if current is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        changed = current.at_site(self._site, self._number, hidden)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


class InputGateHook:
    """A forward hook before a linear module."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        current = current_interventions()
        changed = None if current is None else current.gate_input(self._path, args[0])
        return None if changed is None else (changed, *args[1:])


class OutputGateHook:
    """A forward hook behind a linear module."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        current = current_interventions()
        return None if current is None else current.gate_output(self._path, output)


def _find_blocks(base: PreTrainedModel, hidden_size: int) -> tuple[list[nn.Module], "WeakSet[nn.Module]"]:
    """The members of the list of modules that tokens go through, one after the other, as hidden states.

    Also all modules of the base model that put out such, once in a pass.
    """
    name = type(base).__name__
    if getattr(base.config, "is_encoder_decoder", False):
        raise BaseModelError(
            f"{name} is an encoder-decoder; interventions on blocks work on decoder-only and encoder-only models. Use "
            "a causal language model."
        )
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module)]
    seen: dict[nn.Module, int] = {}

    def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) and output else output
        if isinstance(hidden, Tensor) and hidden.ndim == 3 and hidden.shape[0] == 1 and hidden.shape[2] == hidden_size:
            seen[module] = seen.get(module, 0) + 1

    handles = [module.register_forward_hook(see) for module in base.modules()]
    try:
        run_plain(base)
    finally:
        for handle in handles:
            handle.remove()
    found = [list(one) for one in lists if all(seen.get(member) == 1 for member in one)]
    outermost = [
        one for one in found if not any(one[0] in set(other[0].modules()) for other in found if other is not one)
    ]
    wanted = int(
        getattr(base.config.get_text_config(decoder=True), "num_hidden_layers", len(outermost[0]) if outermost else 0)
    )
    matching = [one for one in outermost if len(one) == wanted]
    if len(matching) != 1:
        raise BaseModelError(
            f"{name} has no single list of {wanted} blocks that hand on hidden states [sequences, tokens, "
            f"{hidden_size}], where interventions act. Use a causal language model of transformers."
        )
    return matching[0], WeakSet(module for module, count in seen.items() if count == 1)
