"""Science experts and mixtures, a step at a time or all in one.

python -m examples.science plan      # the steps, what is done, and some minutes for each
python -m examples.science run       # what is left; after any interruption the same command goes on
python -m examples.science run --settings examples/science/smoke.toml   # all of it with almost nothing, in minutes
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from examples.science.settings import DOMAINS, Settings, SettingsError, read_settings

HERE = Path(__file__).resolve().parent


def _subjects(settings: Settings, options: argparse.Namespace) -> None:
    from examples.science.make import make_subjects

    make_subjects(settings, options.downloads)


def _questions(settings: Settings, options: argparse.Namespace) -> None:
    from examples.science.make import make_questions
    from examples.science.mixed import make_mixed

    make_questions(settings)
    make_mixed(settings)


def _baselines(settings: Settings, options: argparse.Namespace) -> None:
    from examples.science.baselines import measure

    measure(settings)


def _lower_rank(settings: Settings, options: argparse.Namespace) -> None:
    from examples.science.ship import lower_ranks

    lower_ranks(settings)


def _ask(settings: Settings, options: argparse.Namespace) -> None:
    from examples.science.answers import ask_all

    ask_all(settings)


def _gates(settings: Settings, options: argparse.Namespace) -> None:
    from examples.science.gates import draw_all

    draw_all(settings)


def _ablate(settings: Settings, options: argparse.Namespace) -> None:
    from examples.science.gates import ablate_all

    ablate_all(settings)


def _table(settings: Settings, options: argparse.Namespace) -> None:
    from examples.science.table import write_table

    print(write_table(settings, settings.output / "table.md"))


def _ship(settings: Settings, options: argparse.Namespace) -> None:
    from examples.science.ship import ship

    ship(settings, options.to, joint=options.joint)


def _speed(settings: Settings, options: argparse.Namespace) -> None:
    from examples.science.speed import measure

    measure(settings, options.steps, options.domains or list(settings.experts))


def _plan(settings: Settings, options: argparse.Namespace) -> None:
    from examples.science.runner import share_done
    from examples.science.steps import steps_of

    left = 0.0
    for step in steps_of(settings, options.settings, options.downloads):
        done = share_done(settings.output, step)
        minutes = step.seconds / 60
        left += (1 - done) * minutes
        print(f"{step.name:22} {minutes:7.1f} min  {'done' if done == 1 else f'{100 * done:3.0f} %'}")
    print(f"{'left':22} {left:7.1f} min, {left / 60:.1f} hours")


def _run(settings: Settings, options: argparse.Namespace) -> None:
    from examples.science.runner import StepFailedError, run
    from examples.science.steps import steps_of, write_jobs

    write_jobs(settings)
    steps = steps_of(settings, options.settings, options.downloads)
    wanted = options.only or [step.name for step in steps]
    unknown = [name for name in wanted if name not in {step.name for step in steps}]
    if unknown:
        raise SystemExit(f"there is no step {unknown[0]!r}. The steps: {[step.name for step in steps]}.")
    by_name = {step.name: step for step in steps}
    try:
        run(settings.output, [by_name[name] for name in wanted], again=bool(options.only), processes=options.processes)
    except StepFailedError as error:
        raise SystemExit(str(error)) from error


COMMANDS: dict[str, tuple[Callable[[Settings, argparse.Namespace], None], str]] = {
    "plan": (_plan, "the steps, what is done, and some minutes for each"),
    "run": (_run, "run what is left; or the steps of --only, in their order there, also if they are done"),
    "speed": (_speed, "measure seconds a step of each expert here, for the plan"),
    "subjects": (_subjects, "read the packages"),
    "questions": (_questions, "write training records and held-out questions"),
    "baselines": (_baselines, "models from libraries on the same questions"),
    "lower-rank": (_lower_rank, "the experts with the rank that is kept"),
    "ask": (_ask, "every column's answers to all test questions"),
    "gates": (_gates, "pictures of the mixtures' gates"),
    "ablate": (_ablate, "the mixtures without one expert at a time"),
    "table": (_table, "score all answers and print the tables"),
    "ship": (_ship, "copy adapters, mixtures and scores to a folder of at most 40 MB"),
}


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m examples.science", description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("--settings", type=Path, default=HERE / "settings.toml")
        command.add_argument("--downloads", type=Path, default=Path("runs/packages"), help="folder of package files")
        if name == "run":
            command.add_argument("--only", nargs="+", help="names of steps")
            command.add_argument(
                "--processes", type=int, default=1, help="experts that train at a time and share the processors"
            )
        if name == "speed":
            command.add_argument("--steps", type=int, default=4)
            command.add_argument("--domains", nargs="+", choices=DOMAINS)
        if name == "ship":
            command.add_argument("--to", type=Path, required=True)
            command.add_argument("--joint", action="store_true", help="the experts as joint training left them")
    options = parser.parse_args()
    try:
        settings = read_settings(options.settings)
    except SettingsError as error:
        raise SystemExit(str(error)) from error
    COMMANDS[options.command][0](settings, options)


if __name__ == "__main__":
    main()
