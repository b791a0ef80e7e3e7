"""`loraplex serve`: the HTTP server. Its flags are the settings of server/settings.py."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from loraplex.cli.errors import quiet_libraries
from loraplex.cli.help import sections
from loraplex.cli.options import named_values
from loraplex.errors import ConfigError
from loraplex.server.settings_sources import Option, as_toml, load_config, options

EngineName = Literal["loraplex", "vllm"]
_SINGULAR = {
    "adapters": "adapter",
    "mixtures": "mixture",
    "adapter_roots": "adapter_root",
    "cors_origins": "cors_origin",
    "allowed_hosts": "allowed_host",
}


def serve(
    config: Path | None, print_config: bool, replicas: int, engine: EngineName, vllm_args: str, **given: Any
) -> None:
    """Serve the model and its adapters over HTTP, with OpenAI's API (docs/serving.md)."""
    known = {option.name: option for option in options()}
    flags = {name: _value(known[name], value) for name, value in given.items() if value not in (None, [])}
    settings = load_config(config, flags=flags)
    if print_config:
        typer.echo(as_toml(settings), nl=False)
        return
    if vllm_args and engine != "vllm":
        raise ConfigError("--vllm-args is for --engine vllm. Leave it out, or add --engine vllm.")
    if settings.training.training and (replicas > 1 or engine == "vllm"):
        raise ConfigError("--training needs one server with loraplex's own engine. Leave --replicas and --engine out.")
    if engine == "vllm":
        from loraplex.cli.serve_vllm import serve_with_vllm

        if replicas > 1:
            raise ConfigError("--replicas doesn't go with --engine vllm: vLLM scales by itself (docs/vllm.md).")
        serve_with_vllm(settings, vllm_args)
    if replicas > 1:
        from loraplex.server.replicas.cluster import run_replicas

        run_replicas(settings, replicas)
        return
    from loraplex.server.lifecycle import run  # imports the web framework, and transformers

    quiet_libraries()
    run(settings)


def _value(option: Option, value: Any) -> Any:
    return named_values(value, _flag(option)) if option.kind is Mapping else value


def _flag(option: Option) -> str:
    return "--" + _SINGULAR.get(option.name, option.name).replace("_", "-")


def _parameter(option: Option) -> inspect.Parameter:
    """A flag that is None where it isn't given, so that other sources count."""
    flag = _flag(option)
    declared = f"{flag}/--no-{flag[2:]}" if option.kind is bool else flag
    kind: Any = list[str] if option.kind in (tuple, Mapping) else option.kind
    default = option.default
    shown = {True: "on", False: "off"}[default] if isinstance(default, bool) else str(default)
    help_text = f"{option.help} [default: {shown}]" if default not in (None, "", (), {}) else option.help
    annotation = Annotated[kind | None, typer.Option(declared, help=help_text, show_default=False)]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give the command one flag for each setting, in the place of **given."""
    config = Annotated[Path | None, typer.Option("--config", help="TOML or JSON file of settings.", exists=True)]
    printing = Annotated[bool, typer.Option("--print-config", help="Print all settings as TOML, and end.")]
    copies = Annotated[int, typer.Option("--replicas", min=1, help="Servers behind one address, through Ray Serve.")]
    engines = Annotated[EngineName, typer.Option("--engine", help="loraplex's own engine, or vLLM (docs/vllm.md).")]
    others = Annotated[str, typer.Option("--vllm-args", help="More arguments for vLLM's server, with --engine vllm.")]
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("config", keyword, default=None, annotation=config),
        inspect.Parameter("print_config", keyword, default=False, annotation=printing),
        inspect.Parameter("replicas", keyword, default=1, annotation=copies),
        inspect.Parameter("engine", keyword, default="loraplex", annotation=engines),
        inspect.Parameter("vllm_args", keyword, default="", annotation=others),
        *(_parameter(option) for option in options()),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    firsts: dict[str, str] = {}
    for option in options():
        firsts.setdefault(option.section, option.name)
    command = sections(**{name: section.capitalize() for section, name in firsts.items()})(command)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


serve = _with_flags(serve)
