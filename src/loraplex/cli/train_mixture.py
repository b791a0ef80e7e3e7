"""`loraplex train mixture`: the scaling head of an X-LoRA mixture, or a linear router."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from loraplex.adapters.peft.hub import resolve_mixture_folder
from loraplex.cli.flag_groups import takes
from loraplex.cli.options import Model, named_values, results_table
from loraplex.cli.training_flags import MIXTURE
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


@takes("Data and output", *MIXTURE)
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
    share: Annotated[list[str] | None, typer.Option(help="NAME=NUMBER: a domain's part of an epoch.")] = None,
    eval_data: Annotated[list[str] | None, typer.Option(help="NAME=FILE, or FILE, of held-out records.")] = None,
    **options: Any,
) -> None:
    """Train a mixture of adapters: a scaling head that weighs the experts for each token (X-LoRA), or a router."""
    check_kind(context, router)
    config = _config(context.params, read_sources(eval_data, [], "--eval-data") if eval_data else None)
    sources = read_sources(data, share or [], "--data")
    teacher = options["teacher"]
    if (experts is not None or (teacher is not None and init_from is None)) == (init_from is not None):
        raise ConfigError(
            "Give --experts for a new mixture (or --teacher, whose experts are taken), or --init-from to train one on; "
            "not both, and not neither."
        )
    settings = _xlora_settings(context.params)
    place = {key: options[key] for key in ("dtype", "device", "weights")}
    base = MultiLoraModel.from_pretrained(model, **place)
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
        _create(base, name, folders, config_of_mixture, config.seed)
    result = train_mixture(base, name, sources, config)
    Console().print(results_table("mixture", [result]))


def _config(given: Mapping[str, Any], eval_data: Sequence[DataSource] | None) -> MixtureTrainConfig:
    """The options have the names of the configurations' fields; what is read from text comes after."""
    is_new_router = given["router"] is not None and given["init_from"] is None
    name, options = given["name"], dict(given)
    options |= {
        "max_steps": 300 if given["steps"] is None and given["epochs"] is None else given["steps"],
        "max_grad_norm": _number_or_none(given["max_grad_norm"]),
        "eval_data": eval_data,
        "teacher": f"{name}-teacher" if given["teacher"] is not None else None,
        "first_weights": given["first_weights"] or ("noise" if is_new_router else "kept"),
    }
    return compose(MixtureTrainConfig, _named(MixtureTrainConfig, options), f"mixture {name!r}")


def _xlora_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    return _named(XLoraConfig, given) | {"scaling_pass_value": _number_or_none(given["scaling_pass_value"])}


def _named(config: type[Any], options: Mapping[str, Any]) -> dict[str, Any]:
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
