"""Give the modules of a base model that share one weight a weight each, and say so in the model's config."""

from collections.abc import Collection, Iterable, Mapping

from torch import nn
from transformers import PreTrainedModel

from loraplex.errors import BaseModelError
from loraplex.layers.base.modules import input_embedding
from loraplex.validation import listed


def untie_weights(base: PreTrainedModel, paths: Collection[str]) -> bool:
    """Untie the input embedding and the output layer if one of the modules at `paths` shares its weight with another.

    An adapter belongs to one module: in the weight that both share it would act in both. Returns whether something was
    untied. Raises BaseModelError, before anything changes, where other modules share the weight, or the model's class
    ties them whatever its config says.
    """
    sharing = check_shared(base, paths)
    if not sharing:
        return False
    tied = _tied_keys(base)
    _untie_config(base, sharing)
    for key in tied:  # all of them: whoever reads the config ties none
        _own_copy(base, key)
    base.all_tied_weights_keys = {}
    return True


def check_shared(base: PreTrainedModel, paths: Collection[str]) -> dict[str, list[str]]:
    """Those of `paths` whose weight other modules have too, with the paths of all that have it.

    Raises BaseModelError where these aren't the input embedding and the output layer of a decoder or an encoder.
    """
    owners = _owners(base)
    sharing = {path: owners[id(base.get_submodule(path).weight)] for path in paths}
    sharing = {path: names for path, names in sharing.items() if len(names) > 1}
    for path, names in sharing.items():
        _check_may_untie(base, path, names)
    return sharing


def _owners(base: PreTrainedModel) -> Mapping[int, list[str]]:
    """By id of a parameter, the paths of all modules that have it."""
    owners: dict[int, list[str]] = {}
    for path, module in base.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(path)
    return owners


def _check_may_untie(base: PreTrainedModel, path: str, owners: Collection[str]) -> None:
    ends = (input_embedding(base), base.get_output_embeddings())
    modules = [base.get_submodule(owner) for owner in owners]
    is_known = all(any(module is end for end in ends) for module in modules)
    if getattr(base.config, "is_encoder_decoder", False) or not is_known:
        others = [owner for owner in owners if owner != path]
        raise BaseModelError(
            f"adapters can't be merged into {path!r}: {type(base).__name__} shares its weight with {listed(others)}, "
            "where they would act too. Serve them with the base model instead."
        )


def _untie_config(base: PreTrainedModel, paths: Iterable[str]) -> None:
    found = (base.config, base.config.get_text_config(decoder=True))
    configs = [config for config in found if hasattr(config, "tie_word_embeddings")]
    before = [config.tie_word_embeddings for config in configs]
    for config in configs:
        config.tie_word_embeddings = False
    if _tied_keys(base):
        for config, value in zip(configs, before, strict=True):
            config.tie_word_embeddings = value
        raise BaseModelError(
            f"adapters can't be merged into {listed(paths)}: {type(base).__name__} ties this weight to that of another "
            "module, whatever its config says. Serve them with the base model instead."
        )


def _tied_keys(base: PreTrainedModel) -> dict[str, str]:
    """The parameters that the config ties, each with the one that it is."""
    keys: dict[str, str] = base.get_expanded_tied_weights_keys(all_submodels=True)
    return keys


def _own_copy(base: PreTrainedModel, key: str) -> None:
    path, _, name = key.rpartition(".")
    module = base.get_submodule(path)
    tied = getattr(module, name)
    setattr(module, name, nn.Parameter(tied.detach().clone(), requires_grad=False))
