"""Check that an adapter belongs to a base model."""

from collections.abc import Iterable, Mapping, Set

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.finite import require_finite
from loraplex.adapters.targets import expected_targets, targeted_parameters
from loraplex.adapters.weights import Adapter, ModuleShape
from loraplex.errors import AdapterFormatError, BaseModelMismatchError, UnsupportedAdapterError
from loraplex.validation import listed, quoted

SMALL_RANK = 1024


def check_fits(adapter: Adapter, modules: Mapping[str, ModuleShape], *, output_module: str | None = None) -> None:
    """`check_shapes_fit` of an adapter's own shapes."""
    shapes = {path: weights.shape for path, weights in adapter.layers.items()}
    check_shapes_fit(adapter.config, shapes, modules, output_module=output_module)


def check_shapes_fit(
    config: LoraConfig,
    shapes: Mapping[str, ModuleShape],
    modules: Mapping[str, ModuleShape],
    *,
    output_module: str | None = None,
) -> None:
    """Raise unless an adapter's modules are exactly those that its configuration targets in this base.

    `shapes` holds the adapter's modules by path, `modules` the base's linear and embedding modules, `output_module` is
    the path of its output embedding. Raises BaseModelMismatchError (a module is not in the base, or has another kind or
    shape) and AdapterFormatError (the files and the configuration disagree about which modules are adapted, or a rank
    is larger than anything that a module of its shape could need).
    """
    made_for = f"The adapter was made for base model {quoted(config.base_model_name_or_path)}"
    foreign = shapes.keys() - modules.keys()
    if foreign:
        raise BaseModelMismatchError(
            "the adapter has weights for modules that are no linear or embedding modules, stacked experts or routers "
            f"of this base model: {listed(foreign)}. {made_for}; the base has, for example, "
            f"{listed(list(modules)[:3])}."
        )
    wrong = {}
    for path, shape in shapes.items():
        difference = _difference(shape, modules[path])
        if difference is not None:
            wrong[path] = difference
    if wrong:
        few = "; ".join(f"{path!r}: {wrong[path]}" for path in list(wrong)[:5])
        size = _resized_to({path: shapes[path] for path in wrong}, modules, output_module)
        if size is not None:
            raise BaseModelMismatchError(
                f"the adapter has factors for tables of {size} tokens, which this base model doesn't have: {few}. It "
                "was trained on a base model that was resized. Do the same with transformers' model: "
                f"base.resize_token_embeddings({size}), then MultiLoraModel(base, source=...)."
            )
        raise BaseModelMismatchError(
            f"{len(wrong)} of the adapter's {len(shapes)} modules don't fit this base model: {few}. "
            f"{made_for}; load that one."
        )
    check_ranks(config.ranks_of(tuple(shapes)), shapes)
    if config.target_modules is None and not config.target_parameters:
        raise UnsupportedAdapterError(
            "target_modules is null, so PEFT would choose by architecture. List the adapted modules in it."
        )
    _check_same_modules(config, shapes.keys(), set(expected_targets(config, modules, output_module=output_module)))


def check_parameters(config: LoraConfig, parameters: Iterable[str], modules: Mapping[str, ModuleShape]) -> None:
    """Raise UnsupportedAdapterError if the configuration targets a parameter of the base that no adapter can reach.

    `parameters` are the paths of all parameters of the base model, `modules` its adaptable modules and parameters.
    """
    wrong = [path for path in targeted_parameters(config, parameters) if path not in modules]
    if wrong:
        raise UnsupportedAdapterError(
            f"target_parameters is {_short(config.target_parameters)}, which names {listed(wrong)} in this base model. "
            "Supported are the stacked weights of feed-forward experts (gate_up_proj, up_proj, down_proj) and the "
            "weight of their router; name the weight of a linear module in target_modules instead."
        )


def check_ranks(ranks: Mapping[str, int], shapes: Mapping[str, ModuleShape]) -> None:
    """Raise AdapterFormatError for a rank above both sides of its module, where it isn't small anyway."""
    for path, rank in ranks.items():
        most = max(shapes[path].in_features, shapes[path].out_features, SMALL_RANK)
        if rank > most:
            raise AdapterFormatError(
                f"{path!r} has rank {rank}, but the module is {_arrow(shapes[path])}: a rank above {most} adds nothing "
                "to it but memory. Lower r or rank_pattern."
            )


def check_weights(adapter: Adapter) -> None:
    """Raise AdapterFormatError unless the factors of each module agree in rank and are finite.

    For adapters made in memory; those from files are checked while they are read.
    """
    configured = adapter.config.ranks_of(tuple(adapter.layers))
    for path, weights in adapter.layers.items():
        ranks = (weights.rank, weights.lora_b.shape[0] // weights.num_experts, configured[path])
        if len(set(ranks)) > 1:
            raise AdapterFormatError(
                f"{path!r}: lora_a has rank {ranks[0]}, lora_b {ranks[1]} and the configuration {ranks[2]}; all must "
                "agree."
            )
        if weights.lora_a.shape[0] % weights.num_experts or weights.lora_b.shape[0] % weights.num_experts:
            raise AdapterFormatError(
                f"{path!r}: lora_a has {weights.lora_a.shape[0]} rows and lora_b {weights.lora_b.shape[0]}, which are "
                f"not those of {weights.num_experts} experts."
            )
        num_outputs = weights.lora_b.shape[1]
        for what, vector in (("magnitude", weights.magnitude), ("bias", weights.bias)):
            if vector is not None and vector.shape != (num_outputs,):
                raise AdapterFormatError(
                    f"{path!r}: the {what} has shape {list(vector.shape)}; expected {[num_outputs]}, one for each "
                    "output."
                )
        for part in ("lora_a", "lora_b", "magnitude", "bias"):
            tensor = getattr(weights, part)
            if tensor is not None:
                require_finite(tensor, f"{part} of {path!r}")


def _resized_to(
    wrong: Mapping[str, ModuleShape], modules: Mapping[str, ModuleShape], output_module: str | None
) -> int | None:
    """How many tokens the adapter's base had, if that is all that differs in embedding and output layer."""
    sizes = set()
    for path, shape in wrong.items():
        is_output = path == output_module and shape.kind == modules[path].kind == "linear"
        if shape.kind == modules[path].kind == "embedding" and shape.out_features == modules[path].out_features:
            sizes.add(shape.in_features)
        elif is_output and shape.in_features == modules[path].in_features:
            sizes.add(shape.out_features)
        else:
            return None
    return sizes.pop() if len(sizes) == 1 else None


def _difference(shape: ModuleShape, module: ModuleShape) -> str | None:
    if shape.kind != module.kind:
        return f"the adapter's is for {_article(shape.kind)} module, the base's is {_article(module.kind)}"
    if shape != module:
        return f"the adapter's is {_arrow(shape)}, the base's {_arrow(module)}"
    return None


def _check_same_modules(config: LoraConfig, paths: Set[str], expected: Set[str]) -> None:
    base = f"(adapter made for base model {quoted(config.base_model_name_or_path)})"
    missing = expected - paths
    if missing:
        raise AdapterFormatError(
            "the configuration targets modules of this base model that the files hold no weights for: "
            f"{listed(missing)} {base}. Narrow target_modules, target_parameters, layers_to_transform or "
            "exclude_modules, or restore the weights."
        )
    extra = paths - expected
    if extra:
        raise AdapterFormatError(
            f"the files hold weights for modules that the configuration doesn't target: {listed(extra)} "
            f"{base}. PEFT would drop them. target_modules is {_short(config.target_modules)}, target_parameters "
            f"{_short(config.target_parameters)}; add them, or remove the weights."
        )


def _article(kind: str) -> str:
    return f"an {kind}" if kind.startswith("e") else f"a {kind}"


def _arrow(shape: ModuleShape) -> str:
    stacked = f"{shape.num_experts} x " if shape.kind == "moe experts" else ""
    return f"{stacked}{shape.in_features} -> {shape.out_features}"


def _short(targets: tuple[str, ...] | str | None) -> str:
    return listed(targets) if isinstance(targets, tuple) else quoted(targets)
