"""The base model's own weights, and the others that an adapter brings in their place, as PEFT loads them.

PEFT 0.21 knows three ways (`set_peft_model_state_dict`, `set_additional_trainable_modules`):

- modules_to_save: a module of the adapter's own runs instead of the base's. A module that shares its weight with it
  (a tied output layer) is another one, and stays.
- Any other weight of the base (copies that save_embedding_layers writes, biases) is loaded into the base's parameter,
  and whoever shares the parameter takes it.
- trainable_token_indices: rows of the input embedding, and of the output layer where the two are tied.

The base model itself stays as it is: what runs is the difference (layers/own_weights/module_changes.py).
"""

from collections.abc import Collection, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.contents import ContentsConfig
from loraplex.adapters.peft.reader import ContentShapes, content_shapes
from loraplex.adapters.store.module_change import ModuleChange
from loraplex.adapters.weights import Adapter
from loraplex.errors import AdapterFormatError, BaseModelMismatchError, UnsupportedAdapterError
from loraplex.kernels.int8_weight import Int8Weight
from loraplex.layers.attach import AdaptableModel
from loraplex.layers.own_weights.weight_changes import Replacement, module_change
from loraplex.validation import listed, quoted

MAX_ADDED_TOKENS = 1 << 16


class OwnWeights:
    """One base model's parameters by path, with those that are shared under each of their paths."""

    def __init__(self, base: PreTrainedModel, adaptable: AdaptableModel) -> None:
        self._base = base
        self._adaptable = adaptable

    # Before anything is read

    def check(self, config: LoraConfig, shapes: ContentShapes) -> None:
        """Raise unless what an adapter brings is what its settings name, and fits this base model.

        AdapterFormatError, BaseModelMismatchError or UnsupportedAdapterError.
        """
        parameters = self._parameters
        self._check_replaced(config, shapes.replaced, parameters)
        self._check_token_rows(config, shapes.token_rows)
        self._check_names(config, shapes)
        self._check_vocabulary(config, shapes)
        missing = [
            path
            for path in parameters
            if config.contents.saves(module_of(path))
            and path not in shapes.replaced
            and not self._is_shared(path, shapes)
        ]
        if missing:
            raise AdapterFormatError(
                f"modules_to_save is {list(config.contents.modules_to_save)}, but the file has no {listed(missing)}. "
                "Save the adapter again."
            )
        if config.alora_invocation_tokens and (shapes.replaced or shapes.token_rows):
            raise UnsupportedAdapterError(
                "alora_invocation_tokens can't be honoured together with weights of the base model "
                f"({listed([*shapes.replaced, *shapes.token_rows])}), which would count before the invocation too. "
                "Train an aLoRA of factors alone."
            )

    def _check_replaced(
        self, config: LoraConfig, shapes: Mapping[str, tuple[int, ...]], parameters: Mapping[str, Tensor]
    ) -> None:
        foreign = [path for path in shapes if path not in parameters]
        if foreign:
            raise BaseModelMismatchError(
                f"the adapter comes with {listed(foreign)}, which this base model doesn't have. It was made for "
                f"{quoted(config.base_model_name_or_path)}; load that one{_head_hint(config.task_type)}."
            )
        unnamed = [path for path in shapes if not self._may_come(path, config)]
        if unnamed:
            raise UnsupportedAdapterError(
                f"the adapter holds weights of the base model itself that no setting names: {listed(unnamed)}. "
                "Supported: those of modules_to_save, biases, and copies of embedding and output layer."
            )
        for path, shape in shapes.items():
            own = tuple(parameters[path].shape)
            is_table = path.endswith(".weight") and self._canonical(module_of(path)) in self._adaptable.tables
            if shape != own and not (is_table and shape[1:] == own[1:] and shape[0] > 0):
                raise BaseModelMismatchError(
                    f"the adapter comes with {path!r} of shape {list(shape)}; in the base model it has {list(own)}. "
                    "Load the base model that the adapter was trained on."
                )

    def _may_come(self, path: str, config: LoraConfig) -> bool:
        module = module_of(path)
        is_table = self._canonical(module) in self._adaptable.tables
        return path.endswith(".bias") or is_table or config.contents.saves(module)

    def _is_shared(self, path: str, shapes: ContentShapes) -> bool:
        """Whether the file has the parameter under another of its modules' paths."""
        names = self._canonical(module_of(path)), path.rpartition(".")[2]
        return any((self._canonical(module_of(other)), other.rpartition(".")[2]) == names for other in shapes.replaced)

    def _check_names(self, config: LoraConfig, shapes: ContentShapes) -> None:
        """Raise for a module of several paths of which PEFT would replace one: the others go on with the base's."""
        saved = {module_of(path) for path in shapes.replaced if config.contents.saves(module_of(path))}
        for path in {*saved, *shapes.token_rows}:
            module = self._base.get_submodule(path)
            names = [name for name, other in self._base.named_modules(remove_duplicate=False) if other is module]
            if len(names) > 1:
                raise UnsupportedAdapterError(
                    f"the adapter brings {path!r} whole or in rows, which this base model knows as {listed(names)}: "
                    "PEFT changes it under one name alone. Adapt it by LoRA (target_modules) instead."
                )

    def _check_token_rows(self, config: LoraConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
        wanted = config.contents.token_rows
        if wanted and not shapes:
            raise AdapterFormatError(
                f"trainable_token_indices is {quoted(dict(wanted))}, but the file has no trainable_tokens_delta. Save "
                "the adapter again."
            )
        for path, shape in shapes.items():
            if path not in self._paths_of_all or self._canonical(path) not in self._adaptable.tables:
                raise UnsupportedAdapterError(
                    f"trainable_token_indices can't be honoured for {path!r}, which is neither the input embedding nor "
                    f"the output layer of this base model ({self._embedding!r}, {self._adaptable.output_module!r})."
                )
            tokens, own = config.contents.tokens_of(path), self._parameters[f"{path}.weight"].shape
            if shape != (len(tokens), own[1]):
                raise BaseModelMismatchError(
                    f"the adapter has token rows of shape {list(shape)} for {path!r}; trainable_token_indices has "
                    f"{len(tokens)} tokens, and the base model's rows have {own[1]} values."
                )
            for target in self._mirrored(path, shapes):
                if self._parameters.get(f"{module_of(target)}.bias") is not None:
                    raise UnsupportedAdapterError(
                        f"trainable_token_indices can't be honoured: {module_of(target)!r} is tied to the embedding "
                        "and has a bias, which PEFT leaves out. Adapt the embedding by LoRA instead."
                    )

    def _check_vocabulary(self, config: LoraConfig, shapes: ContentShapes) -> None:
        """Raise unless embedding and output layer have equally many tokens, not too many, and all of them rows."""
        sizes = self._sizes(config, shapes)
        own = {path: self._num_rows(path) for path in sizes}
        if all(sizes[path] == own[path] for path in sizes):
            return
        told = ", ".join(f"{path!r} {sizes[path]} (the base's: {own[path]})" for path in sizes)
        if len(set(sizes.values())) > 1:
            raise UnsupportedAdapterError(
                f"the adapter's embeddings have different numbers of tokens: {told}. Rows that its files don't have "
                "are random in PEFT; save it with PEFT's save_embedding_layers=True."
            )
        if any(sizes[path] > own[path] + MAX_ADDED_TOKENS for path in sizes):
            raise BaseModelMismatchError(
                f"the adapter's embeddings have far more tokens than the base model's: {told}; {MAX_ADDED_TOKENS} more "
                "are possible. Load the base model that the adapter was trained on."
            )
        output = self._adaptable.output_module
        if output is not None and self._parameters.get(f"{output}.bias") is not None:
            raise UnsupportedAdapterError(
                f"the adapter changes the number of tokens: {told}, which can't be done where {output!r} has a bias. "
                "Use a base model whose embedding was resized."
            )

    def vocabulary_size(self, adapter: Adapter) -> int | None:
        """How many tokens the embedding has with the adapter; None: as many as the base's."""
        sizes = self._sizes(adapter.config, content_shapes(adapter))
        changed = [size for path, size in sizes.items() if size != self._num_rows(path)]
        return changed[0] if changed else None

    def brings_tokens(self, adapter: Adapter) -> bool:
        """Whether its settings name rows of embedding or output layer, or it has another number of them."""
        contents = adapter.config.contents
        named = bool(adapter.token_rows) or any(contents.saves(path) for path in self._adaptable.tables)
        return named or self.vocabulary_size(adapter) is not None

    def _sizes(self, config: LoraConfig, shapes: ContentShapes) -> dict[str, int]:
        """By path of the input embedding and the output layer, the tokens that each has with the adapter.

        Raises BaseModelMismatchError where token rows leave a gap behind the last one.
        """
        sources = self._sources(config.contents, shapes.replaced, shapes.token_rows)
        sizes = {}
        for path in self._adaptable.tables:
            whole, rows = sources.get(f"{path}.weight", (None, None))
            size = shapes.replaced[whole][0] if whole else self._num_rows(path)
            added = sorted(token for token in config.contents.tokens_of(rows) if token >= size) if rows else []
            if added != list(range(size, size + len(added))):
                raise BaseModelMismatchError(
                    f"trainable_token_indices names token {added[-1]}, but {path!r} has {size} rows, and not all "
                    "between come with the adapter. Load the base model that it was trained on, or save it with PEFT's "
                    "save_embedding_layers=True."
                )
            sizes[path] = size + len(added)
        return sizes

    # What runs

    def touched(self, adapter: Adapter) -> set[str]:
        """The modules, by path, that the adapter may change."""
        biased = {path for path, weights in adapter.layers.items() if weights.bias is not None}
        return biased | {module_of(path) for path in self._replacements(adapter)}

    def changes(self, adapter: Adapter, dtype: torch.dtype) -> dict[str, ModuleChange]:
        """By module path, what the adapter changes in this base model; nothing where it brings the base's own weights.

        Raises UnsupportedAdapterError for a module that can't be changed row by row.
        """
        by_module: dict[str, dict[str, Replacement]] = {}
        for path, replacement in self._replacements(adapter).items():
            by_module.setdefault(module_of(path), {})[path.rpartition(".")[2]] = replacement
        for path, weights in adapter.layers.items():
            if weights.bias is not None:
                by_module.setdefault(path, {})
        changes = {}
        for path, own in sorted(by_module.items()):
            module, shape = self._base.get_submodule(path), self._adaptable.shapes.get(path)
            changes[path] = module_change(path, module, shape, own, adapter.layers.get(path), dtype)
        return {path: change for path, change in changes.items() if change is not None}

    def _replacements(self, adapter: Adapter) -> dict[str, Replacement]:
        """By parameter path, what takes its place, for each module that has it."""
        sources = self._sources(adapter.config.contents, adapter.replaced, adapter.token_rows)
        return {
            path: Replacement(
                whole=None if whole is None else adapter.replaced[whole],
                rows=None if rows is None else adapter.token_rows[rows],
            )
            for path, (whole, rows) in sources.items()
        }

    def _sources(
        self, contents: ContentsConfig, replaced: Collection[str], token_rows: Collection[str]
    ) -> dict[str, tuple[str | None, str | None]]:
        """By parameter path, the parameter and the embedding under whose paths an adapter has what takes its place."""
        found: dict[str, tuple[str | None, str | None]] = {path: (path, None) for path in replaced}
        for path in replaced:
            if not contents.saves(module_of(path)):
                for other in self._sharing(path):
                    found.setdefault(other, (path, None))
        for module in token_rows:
            for path in [f"{module}.weight", *self._mirrored(module, token_rows)]:
                found[path] = (found.get(path, (None, None))[0], module)
        return {f"{self._canonical(module_of(path))}.{path.rpartition('.')[2]}": own for path, own in found.items()}

    def _mirrored(self, module: str, given: Collection[str]) -> list[str]:
        """The weights that take the token rows of `module` too: those tied to the input embedding, without own rows."""
        if self._canonical(module) != self._embedding:
            return []
        return [path for path in self._sharing(f"{module}.weight") if module_of(path) not in given]

    # The base model's parameters

    @property
    def _parameters(self) -> dict[str, Tensor]:
        return dict(self._base.named_parameters(remove_duplicate=False))

    def _num_rows(self, path: str) -> int:
        """Of a module's weight."""
        return int(self._base.get_parameter(f"{path}.weight").shape[0])

    def _sharing(self, path: str) -> list[str]:
        """The other paths of a parameter, in other modules."""
        return self._others_of.get(path, [])

    @cached_property
    def _others_of(self) -> dict[str, list[str]]:
        """By path of a parameter that several modules share, its paths in the others."""
        groups: dict[int, list[str]] = {}
        for path, parameter in self._parameters.items():
            groups.setdefault(id(parameter), []).append(path)
        shared = [paths for paths in groups.values() if len(paths) > 1]
        tables = [f"{path}.weight" for path in self._adaptable.tables]
        if len(tables) == 2 and _was_tied(*(self._parameters[path] for path in tables)):
            shared.append(tables)
        return {
            path: [other for other in paths if self._canonical(module_of(other)) != self._canonical(module_of(path))]
            for paths in shared
            for path in paths
        }

    @cached_property
    def _paths_of_all(self) -> frozenset[str]:
        return frozenset(path for path, _ in self._base.named_modules(remove_duplicate=False))

    @cached_property
    def _paths(self) -> dict[nn.Module, str]:
        """By module, the first of its paths."""
        return {module: path for path, module in self._base.named_modules()}

    def _canonical(self, path: str) -> str:
        """The path of a module under which others know it."""
        return self._paths.get(self._base.get_submodule(path), path)

    @cached_property
    def _embedding(self) -> str | None:
        return next((path for path, shape in self._adaptable.shapes.items() if shape.kind == "embedding"), None)


def _head_hint(task: str | None) -> str:
    """How a base model with a head for a task is made."""
    made = {
        "SEQ_CLS": "SequenceClassification",
        "TOKEN_CLS": "TokenClassification",
        "QUESTION_ANS": "QuestionAnswering",
    }
    return f" as a model for {task} (AutoModelFor{made[task]}), for MultiLoraModel(base)" if task in made else ""


def module_of(parameter: str) -> str:
    """The path of a parameter's module."""
    return parameter.rpartition(".")[0]


def _was_tied(parameter: Tensor, other: Tensor) -> bool:
    """Whether one is the 8-bit form of the other: before it was quantized the two were one parameter."""
    for held, plain in ((parameter, other), (other, parameter)):
        if isinstance(held, Int8Weight) and not isinstance(plain, Int8Weight) and held.shape == plain.shape:
            return held.is_made_of(plain)
    return False
