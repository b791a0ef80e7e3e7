"""What a run's table has, and where its files lie: nothing here needs a model."""

from pathlib import Path

from examples.science.settings import Settings
from examples.science.tasks import TASKS

FORMS = ("conversations", "two_questions", "two_numbers", "two_properties")  # what needs two experts
TRAINED = {"X-LoRA": "xlora", "router": "router"}  # by column, what its files are named by
MIXTURES = ("uniform", "Arrow", "SpectR", "router", "X-LoRA")
FULL = "full rank"  # each domain's expert before its rank was lowered
JOINT = "joint expert"  # each domain's expert as it left the training with the X-LoRA's head, alone


def answers_path(settings: Settings, column: str) -> Path:
    return settings.output / "answers" / f"{column.lower().replace(' ', '-')}.json"


def question_path(settings: Settings, task: str) -> Path:
    return settings.output / "data" / "test" / f"{task}.jsonl"


def expert_folder(settings: Settings, domain: str) -> Path:
    """What is shipped: the trained adapter, with a lower rank if the settings ask for it."""
    if settings.lora.kept_rank is None:
        return full_folder(settings, domain)
    return settings.output / "experts" / domain


def full_folder(settings: Settings, domain: str) -> Path:
    """The adapter as it was trained."""
    folder = settings.output / "train"
    return folder / domain if settings.lora.together else folder / domain / domain


def mixture_folder(settings: Settings, column: str) -> Path:
    return settings.output / "mixtures" / {"X-LoRA": "xlora-joint", "router": "router"}[column] / "science"


def cells(settings: Settings, *, assume: bool = False) -> list[tuple[str, str]]:
    """All (column, task): each domain's own expert on all its tasks, mixtures on all, others on words and mixed forms.

    Without `assume`, only of the mixed forms whose questions are made.
    """
    mine = {name: domain for domain, expert in settings.experts.items() for name in expert.shares}
    words = [name for name in mine if TASKS[name].kind == "word"]
    forms = [form for form in FORMS if assume or question_path(settings, form).exists()]
    found = [("base", task) for task in [*words, *forms]]
    found += [(domain, task) for task, domain in mine.items()]
    found += [(FULL, task) for task in mine if settings.lora.kept_rank is not None]
    found += [(JOINT, task) for task in mine]
    found += [(domain, form) for domain in settings.experts for form in forms]
    for column in MIXTURES:
        tasks = list(mine) if column in ("router", "X-LoRA") else words
        found += [(column, task) for task in [*tasks, *forms]]
    return found
