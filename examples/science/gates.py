"""What the gates tell, on held-out questions: pictures by domain, layer and token, and what ablating an expert costs.

Scalings of an X-LoRA and gates of a router come from the engine in one form: pictures and numbers are of both.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from examples.science.columns import load_column, load_model
from examples.science.layout import TRAINED, mixture_folder
from examples.science.make import read_asked
from examples.science.settings import Settings
from examples.science.tasks import Asked, tasks_of
from loraplex import Engine, EngineConfig, MultiLoraModel, Request, SamplingParams
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.peft.writer import write_adapter
from loraplex.training.adapters.evaluation import Question, read_questions
from loraplex.viz.scalings_plots import plot_domain_means, plot_layer_means, plot_token_heatmap
from loraplex.xlora.scalings.row_scalings import RowScalings

PICTURED = 30  # questions of each domain
ANSWER_TOKENS = 4
ABLATED = "ablated"  # the mixture's name while an expert is missing


def words_held_out(settings: Settings, domain: str, count: int) -> list[Asked]:
    """Word questions of a domain's validation subjects: test questions are for the table alone."""
    names = {task.name: task.labels for task in tasks_of(domain) if task.kind == "word"}
    labels = {label for found in names.values() for label in found}
    asked = read_asked(settings.output / "data" / f"{domain}.valid.jsonl")
    return [each for each in asked if each.answer in labels][:count]


def scalings_of(engine: Engine, name: str, prompts: Sequence[object]) -> list[RowScalings]:
    """Of each prompt and its greedy answer, the mixture's scalings of every token."""
    how = SamplingParams(max_tokens=ANSWER_TOKENS)
    results = engine.generate(
        [Request(prompt, adapters=name, sampling=how, return_scalings=True) for prompt in prompts]
    )
    rows = []
    for result in results:
        scalings = result.completions[0].scalings
        assert scalings, f"the mixture {name!r} told no scalings"
        rows.append(_without_prefix(scalings[0]))
    return rows


def _without_prefix(row: RowScalings) -> RowScalings:
    """The row under names without the mixture's own in front of each expert's."""
    return replace(row, experts=tuple(expert.rpartition("/")[2] for expert in row.experts))


def draw_all(settings: Settings) -> None:
    model = load_model(settings)
    with Engine(model, EngineConfig(prefix_cache=False)) as engine:  # scalings are of tokens that are run
        for column in TRAINED:
            draw(settings, model, engine, column)


def draw(settings: Settings, model: MultiLoraModel, engine: Engine, column: str) -> None:
    """Write <output>/gates/<column>: by-domain.png, layers.png, a conversation's tokens, and the means as JSON."""
    folder = settings.output / "gates" / TRAINED[column]
    folder.mkdir(parents=True, exist_ok=True)
    name = str(load_column(model, settings, column))
    domains = {
        domain: scalings_of(engine, name, [[{"role": "user", "content": asked.prompt}] for asked in questions])
        for domain in settings.experts
        if (questions := words_held_out(settings, domain, PICTURED))
    }
    conversation = _one_conversation(settings)
    tokens_of = scalings_of(engine, name, [conversation.messages]) if conversation else []
    plot_domain_means(domains, folder / "by-domain.png")
    for domain, rows in domains.items():
        plot_layer_means(rows, folder / f"layers-{domain}.png")
    for row in tokens_of:
        words = [str(model.tokenizer.decode([token])) for token in row.token_ids]
        plot_token_heatmap(row, words, folder / "conversation.png")
    means = {domain: mean_of_question(rows) for domain, rows in domains.items()}
    _write(folder / "means.json", means)


def mean_of_question(rows: Sequence[RowScalings]) -> dict[str, float]:
    """Each expert's mean from where the questions begin to differ, over layers: before it no gate can know."""
    texts = [row.token_ids for row in rows]
    start = next((i for i, tokens in enumerate(zip(*texts, strict=False)) if len(set(tokens)) > 1), 0)
    means = torch.stack([row.values[start:].mean(dim=(0, 1)) for row in rows]).mean(dim=0)
    return {expert: round(float(mean), 4) for expert, mean in zip(rows[0].experts, means, strict=True)}


def _one_conversation(settings: Settings) -> Question | None:
    path = settings.output / "data/mixed/conversations.valid.jsonl"
    found = read_questions(path, 1) if path.exists() else []
    return found[0] if found else None


def ablate_all(settings: Settings) -> None:
    model = load_model(settings)
    with Engine(model, EngineConfig()) as engine:
        for column in TRAINED:
            ablate(settings, model, engine, column)


def ablate(settings: Settings, model: MultiLoraModel, engine: Engine, column: str) -> None:
    """Write <output>/gates/<column>/ablation.json: right answers of each domain without one expert at a time."""
    folder = settings.output / "gates" / TRAINED[column]
    path = folder / "ablation.json"
    means = json.loads((folder / "means.json").read_text())
    results: dict[str, dict[str, float]] = json.loads(path.read_text())["right"] if path.exists() else {}
    questions = {domain: words_held_out(settings, domain, settings.ask.ablation_questions) for domain in means}
    for without in ("nobody", *settings.experts):
        if without not in results:
            results[without] = _right_without(settings, model, engine, column, without, questions)
            _write(path, {"right": results, "summary": summary(results, means)})
            print(f"{column} without {without}: {results[without]}", flush=True)


def _right_without(
    settings: Settings,
    model: MultiLoraModel,
    engine: Engine,
    column: str,
    without: str,
    questions: Mapping[str, Sequence[Asked]],
) -> dict[str, float]:
    """By domain, the share of right answers of the mixture with one expert's update at 0."""
    source = mixture_folder(settings, column)
    experts = {f"{ABLATED}/{domain}": source / domain for domain in settings.experts}
    if without != "nobody":
        empty = settings.output / "gates" / "empty" / f"{TRAINED[column]}-{without}"
        write_empty(source / without, empty)
        experts[f"{ABLATED}/{without}"] = empty
    model.load_mixture(ABLATED, source, experts=experts)
    found = {}
    for domain, asked in questions.items():
        how = SamplingParams(max_tokens=ANSWER_TOKENS)
        prompts = [[{"role": "user", "content": each.prompt}] for each in asked]
        requests = [Request(prompt, adapters=ABLATED, sampling=how) for prompt in prompts]
        texts = [result.text.strip() for result in engine.generate(requests)]
        right = [text == each.answer for text, each in zip(texts, asked, strict=True)]
        found[domain] = round(sum(right) / max(1, len(right)), 4)
    for name in (ABLATED, *experts):
        if name in model.names():  # a mixture takes the experts with it that came with it
            model.unload(name)
    return found


def write_empty(source: Path, target: Path) -> None:
    """An adapter with the modules of `source` that adds nothing."""
    adapter = read_adapter(source)
    layers = {
        path: replace(weights, lora_b=torch.zeros_like(weights.lora_b)) for path, weights in adapter.layers.items()
    }
    write_adapter(replace(adapter, layers=layers), target, overwrite=True)


def summary(right: Mapping[str, Mapping[str, float]], means: Mapping[str, Mapping[str, float]]) -> dict[str, object]:
    """Does it hurt a domain most to lose the expert that its gates name? In how many domains, and by how much.

    `right`: by ablated expert ("nobody" is the whole mixture) and domain. `means`: by domain and expert, mean gates.
    """
    whole = right["nobody"]
    rows = {}
    for domain, gates in means.items():
        named = max(gates, key=lambda expert: gates[expert])
        drops = {expert: whole[domain] - right[expert][domain] for expert in gates if expert in right}
        if named not in drops or len(drops) < 2:
            continue
        others = [drop for expert, drop in drops.items() if expert != named]
        rows[domain] = {
            "named": named,
            "drop": round(drops[named], 4),
            "mean_drop_of_others": round(sum(others) / len(others), 4),
            "hurts_most": drops[named] >= max(others),
        }
    most = sum(bool(row["hurts_most"]) for row in rows.values())
    return {"domains": rows, "hurts_most_in": most, "of": len(rows)}


def _write(path: Path, content: object) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)
