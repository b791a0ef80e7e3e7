"""The steps of a run, in their order: what each runs, and how long it should take here."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.science.layout import FORMS, TRAINED, cells, expert_folder, mixture_folder
from examples.science.settings import Settings

# CPU seconds of one thread on a Xeon with AMX that had much else to do: quantum as `speed` measured it, the others by
# the tokens of their records, mixtures guessed. Measure your own with `speed`: an idle machine takes less.
SECONDS_PER_STEP = {
    "quantum": 5.8,
    "materials": 4.7,
    "protein": 14.5,
    "peptides": 9.0,
    "chemistry": 6.5,
    "barrier": 8.0,
    "head": 8.0,
    "joint": 20.0,
    "router": 10.0,
}
SECONDS_PER_QUESTION = 0.15


@dataclass(frozen=True, kw_only=True)
class Step:
    """One process. `arguments` follow `python -m`; it is done when it has ended with status 0 once."""

    name: str
    arguments: tuple[str, ...]
    seconds: float
    log: Path | None = None  # a training's log, which tells how far it is
    num_steps: int = 0  # of that training
    needs_no_neighbour: bool = False  # of the steps before and after it that say the same


def seconds_per_step(settings: Settings) -> dict[str, float]:
    """What `speed` measured here, else what is written above."""
    path = settings.output / "speed.json"
    measured = json.loads(path.read_text()) if path.exists() else {}
    return SECONDS_PER_STEP | measured


def steps_of(settings: Settings, settings_file: Path, downloads: Path) -> list[Step]:
    """All steps, in an order in which each finds what it needs."""

    def own(name: str, *words: str, seconds: float) -> Step:
        arguments = ("examples.science", *words, "--settings", str(settings_file))
        return Step(name=name, arguments=arguments, seconds=seconds)

    rates = seconds_per_step(settings)
    found = [
        own("subjects", "subjects", "--downloads", str(downloads), seconds=90),
        own("questions", "questions", seconds=120),
        *_training(settings, rates),
        own("baselines", "baselines", seconds=settings.baselines.max_rows / 60),
    ]
    if settings.lora.kept_rank is not None:
        found.append(own("lower-rank", "lower-rank", seconds=60))
    found += _mixtures(settings, rates)
    asked = sum(_num_questions(settings, task) for _, task in cells(settings, assume=True))
    ablated = settings.ask.ablation_questions * len(settings.experts) * (len(settings.experts) + 1)
    found += [
        own("ask", "ask", seconds=60 + asked * SECONDS_PER_QUESTION),
        own("gates", "gates", seconds=240),
        own("ablate", "ablate", seconds=60 + len(TRAINED) * ablated * SECONDS_PER_QUESTION),
    ]
    return [*found, own("table", "table", seconds=60)]


def _num_questions(settings: Settings, task: str) -> int:
    return settings.ask.mixed_questions if task in FORMS else settings.ask.questions


def _training(settings: Settings, rates: dict[str, float]) -> list[Step]:
    """`loraplex train adapters` with a file of one job each, or of all jobs in shared batches."""
    if settings.lora.together:
        seconds = sum(expert.steps * rates[domain] for domain, expert in settings.experts.items())
        return [
            _train(
                settings, "experts", "", max(settings.experts, key=lambda each: settings.experts[each].steps), seconds
            )
        ]
    return [
        _train(settings, domain, domain, domain, expert.steps * rates[domain])
        for domain, expert in settings.experts.items()
    ]


def _train(settings: Settings, job: str, folder: str, logged: str, seconds: float) -> Step:
    output = settings.output / "train" / folder
    file = settings.output / "jobs" / f"{job}.toml"
    words = (
        "--model",
        settings.model,
        "--dtype",
        settings.dtype,
        "--output",
        str(output),
        "--config",
        str(file),
        "--packing",
    )
    return Step(
        name=f"train-{job}",
        arguments=("loraplex.cli.train", "adapters", *words),
        seconds=seconds,
        log=output / f"{logged}.jsonl",
        num_steps=settings.experts[logged].steps,
        needs_no_neighbour=True,
    )


def write_jobs(settings: Settings) -> None:
    """Files of `loraplex train adapters`: one for each expert, and experts.toml with all of them."""
    folder = settings.output / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = {domain: _job(settings, domain, expert.steps) for domain, expert in settings.experts.items()}
    for domain, job in jobs.items():
        (folder / f"{domain}.toml").write_text(job)
    (folder / "experts.toml").write_text("\n".join(jobs.values()))


def _job(settings: Settings, domain: str, steps: int) -> str:
    lora, data = settings.lora, settings.output / "data"
    job = {
        "data": str(data / f"{domain}.train.jsonl"),
        "eval_data": str(data / f"{domain}.valid.jsonl"),
        "rank": lora.rank,
        "targets": list(lora.targets),
        "learning_rate": lora.learning_rate,
        "warmup_steps": lora.warmup_steps,
        "steps": steps,
        "batch_size": lora.batch_size,
        "max_length": lora.max_length,
        "eval_every": lora.eval_every,
        "eval_records": lora.eval_records,
        "gates_before_user": lora.gates_before_user,
        "seed": settings.seed,
    }
    return "\n".join([f"[jobs.{domain}]", *(f"{name} = {json.dumps(value)}" for name, value in job.items()), ""])


def _mixtures(settings: Settings, rates: dict[str, float]) -> Iterator[Step]:
    """The X-LoRA's head beside frozen experts, then both together; and a one-pass router that the X-LoRA teaches."""
    mixture, domains = settings.mixture, list(settings.experts)
    experts = [word for domain in domains for word in ("--experts", f"{domain}={expert_folder(settings, domain)}")]
    sources = _sources(settings, [*domains, *FORMS])
    head = settings.output / "mixtures" / "xlora-head"
    shape = (
        "--layout",
        "xlora",
        "--xlora-depth",
        "2",
        "--xlora-size",
        str(mixture.head_size),
        "--xlora-dropout-p",
        "0",
    )
    teacher = mixture_folder(settings, "X-LoRA")
    joint = ("--init-from", str(head / "science"), "--use-trainable-adapters", "--layout", "xlora")
    taught = ("--router", "linear", "--teacher", str(teacher), "--answer-weight", "0")
    yield _mixture_step(
        settings, "head", head, (*experts, *shape), mixture.head_learning_rate, mixture.head_steps, rates, sources
    )
    yield _mixture_step(
        settings, "joint", teacher.parent, joint, mixture.joint_learning_rate, mixture.joint_steps, rates, sources
    )
    folder = mixture_folder(settings, "router").parent
    yield _mixture_step(
        settings, "router", folder, taught, mixture.router_learning_rate, mixture.router_steps, rates, sources
    )


def _sources(settings: Settings, names: list[str]) -> tuple[str, ...]:
    """Data and validation of each source; the mixed forms count half, as experts have met none of them."""
    data = settings.output / "data/mixed"
    words: list[str] = []
    for name in names:
        words += ["--data", f"{name}={data / name}.train.jsonl", "--eval-data", f"{name}={data / name}.valid.jsonl"]
        words += ["--share", f"{name}={0.5 if name in FORMS else 1}"]
    return tuple(words)


def _mixture_step(
    settings: Settings,
    name: str,
    output: Path,
    options: tuple[str, ...],
    learning_rate: float,
    num_steps: int,
    rates: dict[str, float],
    sources: tuple[str, ...],
) -> Step:
    mixture = settings.mixture
    common = {
        "--model": settings.model,
        "--dtype": settings.dtype,
        "--name": "science",
        "--output": str(output),
        "--learning-rate": str(learning_rate),
        "--warmup-steps": str(min(10, num_steps // 2)),
        "--steps": str(num_steps),
        "--batch-size": str(mixture.batch_size),
        "--eval-every": str(mixture.eval_every),
        "--eval-records": str(mixture.valid_records),
        "--seed": str(settings.seed),
    }
    words = [word for pair in common.items() for word in pair]
    return Step(
        name=f"mixture-{name}",
        arguments=("loraplex.cli.train", "mixture", *words, *options, *sources),
        seconds=num_steps * rates[name],
        log=output / "science.jsonl",
        num_steps=num_steps,
    )
