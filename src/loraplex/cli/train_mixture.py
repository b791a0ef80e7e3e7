"""`loraplex train mixture`: the scaling head of an X-LoRA mixture, or a linear router."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from loraplex.adapters.peft.hub import resolve_mixture_folder
from loraplex.cli.help import sections
from loraplex.cli.options import Model, Weights, named_values, results_table
from loraplex.errors import ConfigError
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.routers.config import LinearRouterConfig
from loraplex.training import DataSource, MixtureTrainConfig, RouterTrainConfig, train_mixture
from loraplex.training.core.config import compose, option_names
from loraplex.xlora.config import XLoraConfig
from loraplex.xlora.formats.folders import read_mixture_folder


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number") from None


def _number_or_none(text: str) -> float | None:
    return None if text == "none" else _number(text)


@sections(
    model="Data and output",
    router="Kind of mixture",
    first_weights="Routers, with --router linear",
    layout="Format and domains",
    xlora_depth="X-LoRA's scaling head",
    learning_rate="Optimization",
    patience="Evaluation",
    load_balance_weight="Regularization",
    hidden_cache_bytes="How it is computed",
)
def mixture(
    context: typer.Context,
    model: Model,
    data: Annotated[list[str], typer.Option(help="NAME=FILE of JSON lines, or FILE; once for each domain.")],
    output: Annotated[Path, typer.Option(help="Folder for the mixture, its log, plot and checkpoint.")],
    experts: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER of adapters in the head's order, joined by commas or repeated."),
    ] = None,
    init_from: Annotated[
        Path | None, typer.Option(help="Folder of a mixture to start from, instead of experts and a new head.")
    ] = None,
    name: Annotated[str, typer.Option(help="The mixture's name.")] = "mixture",
    router: Annotated[
        str | None, typer.Option(help="linear: a router in each LoRA layer, in one pass, instead of an X-LoRA.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Folder or hub id of an X-LoRA that teaches the router; its experts are taken.")
    ] = None,
    first_weights: Annotated[
        str | None, typer.Option(help="Of the router: noise (default), arrow, spectr, or kept (of --init-from).")
    ] = None,
    activation: Annotated[str, typer.Option(help="Of the router: softmax, or sigmoid for each expert.")] = "softmax",
    top_k: Annotated[int | None, typer.Option(help="Of the router: keep so many experts of each token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of the router: the fewest whose gates add up to it.")] = None,
    temperature: Annotated[float, typer.Option(help="Divides the router's logits; below 1 is sharper.")] = 1.0,
    shared: Annotated[bool, typer.Option(help="One router for all LoRA layers of one width.")] = False,
    train_experts: Annotated[bool, typer.Option(help="Train the experts with the router.")] = False,
    answer_weight: Annotated[float, typer.Option(help="Weight of the answers in the router's loss.")] = 1.0,
    gate_kl_weight: Annotated[float, typer.Option(help="Weight of the teacher's gates in it.")] = 1.0,
    logit_kl_weight: Annotated[float, typer.Option(help="Weight of the teacher's logits in it.")] = 0.0,
    z_loss_weight: Annotated[float, typer.Option(help="Weight of the router z-loss in it.")] = 0.0,
    layout: Annotated[str, typer.Option(help="Folder format: peft or xlora (the original package's).")] = "peft",
    share: Annotated[list[str] | None, typer.Option(help="NAME=NUMBER: a domain's part of an epoch.")] = None,
    eval_data: Annotated[list[str] | None, typer.Option(help="NAME=FILE, or FILE, of held-out records.")] = None,
    xlora_depth: Annotated[int, typer.Option(help="Linear layers of the scaling head.")] = 1,
    xlora_size: Annotated[int, typer.Option(help="Width of its hidden layers.")] = 2048,
    xlora_dropout_p: Annotated[float, typer.Option(help="Dropout after its hidden layers.")] = 0.2,
    layerwise_scalings: Annotated[bool, typer.Option(help="Other scalings in each LoRA layer.")] = False,
    enable_softmax: Annotated[bool, typer.Option(help="Softmax over the experts.")] = True,
    softmax_temperature: Annotated[float, typer.Option(help="Divides the head's logits; below 1 is sharper.")] = 1.0,
    top_k_lora: Annotated[int | None, typer.Option(help="Keep so many experts of each token.")] = None,
    enable_softmax_topk: Annotated[bool, typer.Option(help="Softmax over the kept ones.")] = False,
    scaling_pass_value: Annotated[str, typer.Option(help="Scalings of the scaling pass; none: 1 / experts.")] = "0",
    global_scaling_weight: Annotated[float, typer.Option(help="Multiplies what every expert adds.")] = 1.0,
    use_trainable_adapters: Annotated[bool, typer.Option(help="Train the experts too.")] = False,
    use_bias: Annotated[bool, typer.Option(help="Biases in the scaling head.")] = True,
    enable_relu_and_dropout: Annotated[bool, typer.Option(help="ReLU and dropout in the scaling head.")] = True,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 1e-3,
    schedule: Annotated[str, typer.Option(help="Learning rate over the steps: constant, linear or cosine.")] = "cosine",
    warmup_steps: Annotated[int, typer.Option(help="Steps in which the learning rate rises from 0.")] = 0,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of AdamW.")] = 0.0,
    max_grad_norm: Annotated[str, typer.Option(help="Clip gradients to this norm; none: don't.")] = "1",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; default 300.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs instead of steps.")] = None,
    batch_size: Annotated[int, typer.Option(help="Records of one micro-batch.")] = 16,
    gradient_accumulation: Annotated[int, typer.Option(help="Micro-batches of a step.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the first weights, the data's order and dropout.")] = 0,
    max_length: Annotated[int, typer.Option(help="Tokens of a record at most; longer ones lose the first.")] = 512,
    patience: Annotated[int | None, typer.Option(help="Evaluations without gain before training stops.")] = None,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 50,
    eval_fraction: Annotated[
        float, typer.Option(help="Share of the records that is held out, without --eval-data.")
    ] = 0.1,
    eval_records: Annotated[int, typer.Option(help="Records of each domain that are evaluated at most.")] = 256,
    load_balance_weight: Annotated[float, typer.Option(help="Weight of the load balance in the loss.")] = 0.0,
    sparsity_weight: Annotated[
        float, typer.Option(help="Weight of the mean entropy of scalings or gates in it.")
    ] = 0.0,
    expert_dropout: Annotated[float, typer.Option(help="Dropout on what each expert reads.")] = 0.0,
    hidden_cache_bytes: Annotated[int, typer.Option(help="Memory for hidden states of the scaling pass.")] = 2 << 30,
    dtype: Annotated[str, typer.Option(help="Dtype of the base model: float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="Where to compute: cpu or cuda.")] = "cpu",
    weights: Weights = "auto",
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    tokens_per_forward: Annotated[int, typer.Option(help="Largest forward pass, in padded tokens.")] = 1024,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in OUTPUT.")] = True,
    plots: Annotated[bool, typer.Option(help="Draw the losses.")] = True,
) -> None:
    """Train a mixture of adapters: a scaling head that weighs the experts for each token (X-LoRA), or a router."""
    check_kind(context, router)
    # The options have the names of the configurations' fields; what is read from text comes after.
    options = dict(context.params)
    settings = _named(XLoraConfig, options) | {"scaling_pass_value": _number_or_none(scaling_pass_value)}
    of_run = _named(MixtureTrainConfig, options) | {
        "max_steps": 300 if steps is None and epochs is None else steps,
        "max_grad_norm": _number_or_none(max_grad_norm),
        "eval_data": read_sources(eval_data, [], "--eval-data") if eval_data else None,
        "teacher": f"{name}-teacher" if teacher is not None else None,
        "first_weights": first_weights or ("noise" if router is not None and init_from is None else "kept"),
    }
    config = compose(MixtureTrainConfig, of_run, f"mixture {name!r}")
    sources = read_sources(data, share or [], "--data")
    if (experts is not None or (teacher is not None and init_from is None)) == (init_from is not None):
        raise ConfigError(
            "Give --experts for a new mixture (or --teacher, whose experts are taken), or --init-from to train one on; "
            "not both, and not neither."
        )
    base = MultiLoraModel.from_pretrained(model, dtype=dtype, device=device, weights=weights)
    if teacher is not None:
        base.load_mixture(f"{name}-teacher", teacher)
    if init_from is not None:
        base.load_mixture(name, init_from)
        if router is None:
            base.configure_mixture(name, **{key: settings[key] for key in settings if _is_given(context, key)})
    else:
        router_config = compose(LinearRouterConfig, _named(LinearRouterConfig, options), "router")
        config_of_mixture = XLoraConfig(**settings) if router is None else router_config
        folders = _experts_of_teacher(teacher) if experts is None else _expert_folders(experts)
        _create(base, name, folders, config_of_mixture, seed)
    result = train_mixture(base, name, sources, config)
    Console().print(results_table("mixture", [result]))


def _named(config: type[Any], options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in option_names(config) if name in options}


def _is_given(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def check_kind(context: typer.Context, router: str | None) -> None:
    """Raise ConfigError for an unknown kind of router, and for options of the other kind of mixture."""
    if router not in (None, "linear"):
        raise ConfigError(f"--router is {router!r}; it can be linear. Arrow and SpectR need no training.")
    of_router = {*option_names(LinearRouterConfig), *option_names(RouterTrainConfig)}
    of_head = {*option_names(XLoraConfig), "layout"}
    wrong = sorted(name for name in (of_router if router is None else of_head) if _is_given(context, name))
    if wrong:
        option = "--" + wrong[0].replace("_", "-")
        raise ConfigError(
            f"{option} is for mixtures with a linear router. Add --router linear, or leave it out."
            if router is None
            else f"{option} is for X-LoRA mixtures, but --router is {router}. Leave it out."
        )


def _expert_folders(experts: Sequence[str]) -> dict[str, str]:
    return named_values([part for option in experts for part in option.split(",")], "--experts")


def _experts_of_teacher(teacher: str | None) -> dict[str, str]:
    assert teacher is not None, "there are experts or a teacher"
    found = read_mixture_folder(resolve_mixture_folder(teacher))
    return {expert: str(folder) for expert, folder in found.experts.items()}


def _create(
    base: MultiLoraModel,
    name: str,
    folders: Mapping[str, str],
    config: XLoraConfig | LinearRouterConfig,
    seed: int,
) -> None:
    for expert, folder in folders.items():
        base.load_adapter(expert, folder)
    base.create_mixture(name, list(folders), config, seed=seed)


def read_sources(files: Sequence[str], shares: Sequence[str], option: str) -> list[DataSource]:
    """NAME=FILE or FILE, with NAME=NUMBER shares. Raises ConfigError."""
    pairs = [file.split("=", 1) if "=" in file else [file, file] for file in files]
    share_of = {}
    for name, text in named_values(shares, "--share").items():
        if name not in [pair[0] for pair in pairs]:
            raise ConfigError(f"--share names {name!r}, but {option} has {[pair[0] for pair in pairs]}.")
        share_of[name] = _number(text)
    return [DataSource(name=name, data=file, share=share_of.get(name)) for name, file in pairs]
