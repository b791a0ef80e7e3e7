"""The names that a base model's modules had before: of other versions of transformers, and of classes around it.

transformers renames what a checkpoint holds when it loads a model (`transformers.conversion_mapping`), and PEFT applies
the same renamings to adapters (`convert_peft_adapter_state_dict_for_transformers`).
"""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from loraplex.adapters.peft.base_layout import BaseLayout, Renaming
from loraplex.adapters.weights import ModuleShape


def layout_of(base: PreTrainedModel, shapes: Mapping[str, ModuleShape]) -> BaseLayout:
    """What reading an adapter for `base` asks about it; `shapes` are its adaptable modules'. Weights aren't needed."""
    model_type = getattr(base.config, "model_type", None)
    return BaseLayout(shapes=shapes, model_type=model_type, renamings=lambda: renamings_for(base))


def renamings_for(base: PreTrainedModel) -> Sequence[Renaming]:
    """What may lead from a parameter's name in an adapter to its name in `base`, each to be tried alone.

    transformers' conversions for this model, one after the other; and the prefix of the model below its head, added or
    taken away ("model."), for adapters of the model with or without a head.
    """
    conversions = [step for step in get_model_conversion_mapping(base) if isinstance(step, WeightRenaming)]
    prefix = f"{base.base_model_prefix}."

    def convert(name: str) -> str:
        for step in conversions:
            name = step.rename_source_key(name)[0]
        return name

    renamings: list[Renaming] = [convert]
    if prefix != ".":
        renamings += [lambda name: prefix + name, lambda name: name.removeprefix(prefix)]
    return renamings
