"""Does `adapters="auto"` choose the right one of a thousand adapters, and what does choosing cost?

    python benchmarks/auto_choice.py
    python benchmarks/auto_choice.py --adapters 50 --questions 10 --rounds 3 --no-save

Five adapters are for the domains in data/, by the centroids of 64 training prompts each (chemistry has no adapter of
its own in examples/: there one of another domain stands in). The others are perturbed: two rank rows of a real adapter,
and a centroid at 45 degrees from a real one. Asked are questions of the test files, the same questions in words that
don't name their domain, and prompts about something else. Times alternate in one process.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, console, save
from torch import Tensor

from loraplex import Engine, EngineConfig, MultiLoraModel, Request, SamplingParams
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.prompt_centroid import PromptCentroid
from loraplex.adapters.weights import Adapter
from loraplex.models.auto.prompt_states import background_tokens, fit_centroids, last_states, prompt_tokens
from loraplex.models.auto.selection import DEFAULT_FLOOR, AutoIndex, Candidates

ROOT = Path(__file__).parent.parent
DOMAINS = ("quantum", "materials", "protein", "peptides", "chemistry")
REAL = DOMAINS[:4]  # with an adapter in examples/adapters
PARTS = ("choice", "methods", "ways")
FLOORS = (0.3, 0.4, 0.5, DEFAULT_FLOOR, 0.6, 0.7, 0.8, 0.9)
ELSEWHERE = """What is the tallest mountain in Africa?|How do I tie a bow tie?|Write a haiku about winter.
Translate 'thank you very much' into French.|Who painted the Mona Lisa?|What is 256 divided by 8?
Give me a recipe for tomato soup.|Explain the offside rule in football.|Is coffee healthy, yes or no?
What is the difference between weather and climate?|Write a short story about a lost dog.
How many continents are there?|Tell me about the history of chess.|What does a lawyer do?
Is this review positive or negative: 'I would buy it again.'|Suggest three books for a long train journey.
Which river flows through London?|How do I remove a coffee stain from a shirt?|Name the four seasons in German.
Write a SQL query that counts the rows of a table.|What is photosynthesis?|How does a vaccine work?
What is the chemical symbol of gold?|Explain what a black hole is.|What is DNA made of?|Name three noble gases.
Is water a conductor of electricity, yes or no?|What is the speed of light?|How is steel made?
Why do metals expand when heated?|Compose a toast for a wedding.|How far is the moon from the earth?
Rate the difficulty of this hike: low, medium or high?|Is the risk of rain tomorrow low, medium or high?
Is the traffic on Monday mornings low, medium or high?|Is this price low, medium or high: 20 euros for a coffee?
Is the word 'quickly' a noun, a verb or an adverb?|Is a whale a fish, a bird or a mammal?
Is the sentence 'I went home' past, present or future?|Is Venus a planet, a star or a moon?
Is 97 a prime number, yes or no?|Is Sydney the capital of Australia, yes or no?|Is it legal to park here, yes or no?
Is this email spam, yes or no: 'You have won a prize'?|Write a function that computes the factorial of n.
What is the plural of 'mouse'?|Who discovered penicillin?|What should I cook tonight with rice and eggs?
Convert 100 degrees Fahrenheit to Celsius.|What is the main idea of the theory of evolution?
Draft an invitation to a birthday party.|How do I reset my password?|What are the side effects of aspirin?
Which proteins are in milk?|What is spider silk?|Explain what a polymer is.|What is the melting point of ice?
Name a hard material.|What does a peptide bond join?|What is a molecule?""".replace("\n", "|").split("|")

Rows = Sequence[Sequence[int]]


def questions(domain: str, split: str, count: int) -> list[str]:
    lines = (ROOT / "data" / domain / f"{split}.jsonl").read_text().splitlines()
    random.Random(0).shuffle(lines)
    return [json.loads(line)["messages"][0]["content"] for line in lines[:count]]


def neutral(question: str) -> str:
    """Without the words that name its domain: "Classify: SUBJECT (low, medium or high)."."""
    head, _, tail = question.partition(":")
    subject = head.split(" ", 1)[1].removeprefix("segment ")
    for words in ("is its HOMO-LUMO gap ", "is its bulk modulus ", "is its melting point ", "is it antimicrobial, "):
        tail = tail.strip().removeprefix(words)
    return f"Classify: {subject} ({tail.rstrip('?')})."


def perturbed(centroid: PromptCentroid, generator: torch.Generator) -> PromptCentroid:
    """At 45 degrees from it, as far from the background."""
    length, along = centroid.direction.norm(), torch.nn.functional.normalize(centroid.direction, dim=0)
    aside = torch.randn(len(along), generator=generator)
    aside = torch.nn.functional.normalize(aside - (aside @ along) * along, dim=0)
    mean = centroid.background + length * (along + aside) / 2**0.5
    return PromptCentroid(mean=mean, background=centroid.background, num_prompts=centroid.num_prompts)


def shrunk(adapter: Adapter, rank: int = 2) -> Adapter:
    """The first rank rows: a thousand adapters are to fit into memory."""
    layers = {
        path: replace(weights, lora_a=weights.lora_a[:rank].clone(), lora_b=_columns(weights.lora_b, rank))
        for path, weights in adapter.layers.items()
    }
    return Adapter(config=replace(adapter.config, r=rank), layers=layers)


def _columns(lora_b: Tensor, rank: int) -> Tensor:
    return lora_b[:rank].clone()  # [rank, out]


def load(model: MultiLoraModel, centroids: Mapping[str, PromptCentroid], num_adapters: int) -> None:
    """The five domains' adapters, and perturbed ones up to the number."""
    adapters = {name: read_adapter(ROOT / "examples" / "adapters" / name) for name in REAL}
    for name in DOMAINS:
        model.load_adapter(name, adapters.get(name, adapters["quantum"]))
        model.registry.set_centroid(name, centroids[name])
    small = [shrunk(adapter) for adapter in adapters.values()]
    generator = torch.Generator().manual_seed(0)
    for i in range(num_adapters - len(DOMAINS)):
        model.load_adapter(f"other-{i}", small[i % len(small)])
        model.registry.set_centroid(f"other-{i}", perturbed(centroids[DOMAINS[i % len(DOMAINS)]], generator))


def measure_choice(index: AutoIndex, states: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of each domain's questions, how many are chosen right, and at the default floor."""
    found = {}
    for domain, hidden in states.items():
        open_choices = [index.choose(row, Candidates(), -1.0) for row in hidden]
        right = [choice.name == domain for choice in open_choices]
        scores = [choice.score or 0.0 for choice in open_choices]
        found[domain] = {
            "questions": len(hidden),
            "right": sum(right) / len(right),
            "right_above_floor": sum(r and s >= DEFAULT_FLOOR for r, s in zip(right, scores, strict=True)) / len(right),
            "least_score": min(scores),
        }
    return found


def measure_floors(index: AutoIndex, own: Tensor, elsewhere: Tensor) -> list[dict[str, float]]:
    """By floor, the share of the domains' questions and of other prompts that get an adapter."""
    best = [[index.choose(row, Candidates(), -1.0).score or 0.0 for row in rows] for rows in (own, elsewhere)]
    return [
        {
            "floor": floor,
            **{
                name: sum(s >= floor for s in scores) / len(scores)
                for name, scores in zip(("own", "elsewhere"), best, strict=True)
            },
        }
        for floor in FLOORS
    ]


# What else was tried, on the four domains with adapters


@torch.no_grad()
def measure_methods(model: MultiLoraModel, count: int) -> dict[str, float]:
    """The share of right choices among four, by where the state is read, and by the adapters' own weights."""
    train = {name: pooled(model, questions(name, "train", 32)) for name in REAL}
    test = {name: pooled(model, questions(name, "test", count)) for name in REAL}
    scores: dict[str, float] = {}
    for way in next(iter(train.values())):
        means = torch.stack([train[name][way].mean(dim=0) for name in REAL])
        center = means.mean(dim=0)
        unit = torch.nn.functional.normalize(means - center, dim=-1)
        right = [(((test[name][way] - center) @ unit.t()).argmax(dim=-1) == i).sum() for i, name in enumerate(REAL)]
        scores[f"centroid, {way}"] = float(sum(right)) / (count * len(REAL))
    return scores | weight_scores(model, count)


def pooled(model: MultiLoraModel, prompts: Sequence[str]) -> dict[str, Tensor]:  # [prompts, hidden] each
    found: dict[str, list[Tensor]] = {}
    for prompt in prompts:
        ids = torch.tensor([prompt_tokens(model.tokenizer, prompt)])
        states = model.base(ids, output_hidden_states=True, logits_to_keep=1).hidden_states
        for where, layer in (("embeddings", 0), ("middle layer", len(states) // 2), ("last layer", len(states) - 1)):
            found.setdefault(f"mean of {where}", []).append(states[layer][0].float().mean(dim=0))
            if layer:
                found.setdefault(f"last token of {where}", []).append(states[layer][0, -1].float())
    return {way: torch.stack(rows) for way, rows in found.items()}


def weight_scores(model: MultiLoraModel, count: int) -> dict[str, float]:
    """SpectR's score |B A x|, summed over tokens and layers, with norms taken out or not."""
    adapters = [read_adapter(ROOT / "examples" / "adapters" / name) for name in REAL]
    right: dict[str, int] = {}
    seen: dict[str, Tensor] = {}
    hooks = [model.base.get_submodule(path).register_forward_pre_hook(_note(seen, path)) for path in adapters[0].layers]
    try:
        for place, name in enumerate(REAL):
            for prompt in questions(name, "test", count):
                model.base(torch.tensor([prompt_tokens(model.tokenizer, prompt)]), logits_to_keep=1)
                for way, scores in _sums(adapters, seen).items():
                    right[way] = right.get(way, 0) + int(scores.argmax() == place)
    finally:
        for hook in hooks:
            hook.remove()
    return {f"SpectR, {way}": hits / (count * len(REAL)) for way, hits in right.items()}


def _note(seen: dict[str, Tensor], path: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
    def hook(module: Any, args: tuple[Tensor, ...]) -> None:
        seen[path] = args[0][0].float()

    return hook


def _sums(adapters: Sequence[Adapter], seen: Mapping[str, Tensor]) -> dict[str, Tensor]:  # [adapters] each
    ways = ("as it is", "over the length of x", "over that of B A", "over both")
    sums = {way: torch.zeros(len(adapters)) for way in ways}
    for path, x in seen.items():
        length = x.norm(dim=-1)
        for i, adapter in enumerate(adapters):
            weights = adapter.layers[path]
            a, b = weights.lora_a.float(), weights.lora_b.float()  # [rank, in], [rank, out]
            score = (x @ a.t() @ b).norm(dim=-1) * weights.scaling
            size = (b.t() @ a).norm() * weights.scaling
            for way, value in zip(sums, (score, score / length, score / size, score / length / size), strict=True):
                sums[way][i] += value.sum()
    return sums


# The other way that is right about the domains: the mean of the input embeddings, which needs no pass


TASKS = (
    "Translate into French: {}",
    "Summarize in one sentence: {}",
    "Is the tone of this text positive, neutral or negative? {}",
    "{} Give this text a title.",
)


def measure_ways(model: MultiLoraModel, count: int) -> dict[str, dict[str, float]]:
    """The share of right choices by the last state and by the mean of embeddings.

    Among the domains by their questions, in other words, and among tasks that are asked about texts of one kind.
    """
    embedding = model.base.get_input_embeddings().weight.detach().float()

    def by_embeddings(rows: Rows) -> Tensor:
        return torch.stack([embedding[torch.tensor(row)].mean(dim=0) for row in rows])

    def by_state(rows: Rows) -> Tensor:
        return last_states(model.base, rows)

    def tokens(prompts: Sequence[str]) -> list[list[int]]:
        return [prompt_tokens(model.tokenizer, prompt) for prompt in prompts]

    asked = [questions(name, "test", count) for name in DOMAINS]
    domains = [tokens(questions(name, "train", count)) for name in DOMAINS]
    texts = paragraphs()
    parts = [texts[i * 2 * count : (i + 1) * 2 * count] for i in range(len(TASKS))]
    assert len(parts[-1]) == 2 * count, f"the documentation has {len(texts)} paragraphs; lower --ways"
    by_task = [tokens([task.format(text) for text in part]) for task, part in zip(TASKS, parts, strict=True)]
    background = background_tokens(model.tokenizer)
    found = {}
    for way, read in (("mean of embeddings", by_embeddings), ("last token of last layer", by_state)):
        center = read(background).mean(dim=0)
        units = [torch.nn.functional.normalize(read(rows).mean(dim=0) - center, dim=0) for rows in domains]
        tasks = [torch.nn.functional.normalize(read(r[:count]).mean(dim=0) - center, dim=0) for r in by_task]
        found[way] = {
            "questions": right_share([read(tokens(rows)) - center for rows in asked], units),
            "other wording": right_share([read(tokens([neutral(q) for q in rows])) - center for rows in asked], units),
            "other tasks": right_share([read(rows[count:]) - center for rows in by_task], tasks),
        }
    return found


def right_share(asked: Sequence[Tensor], units: Sequence[Tensor]) -> float:
    right = [((rows @ torch.stack(list(units)).t()).argmax(dim=-1) == i).float().mean() for i, rows in enumerate(asked)]
    return float(sum(right)) / len(right)


def paragraphs() -> list[str]:
    """Of prose in the documentation."""
    pages = sorted((ROOT / "docs").rglob("*.md"))
    parts = [" ".join(part.split()) for page in pages for part in page.read_text().split("\n\n")]
    texts = [part for part in parts if 30 < len(part.split()) < 90 and not set("|#{}<>") & set(part)]
    random.Random(1).shuffle(texts)
    return texts


# What it costs


def measure_cost(model: MultiLoraModel, lengths: Sequence[int], rounds: int) -> list[dict[str, float]]:
    """Milliseconds of the base model's pass over a prompt, of the pass that chooses, and to the first token."""
    text = " ".join(questions("chemistry", "test", 60))
    ids = model.tokenizer(text)["input_ids"]
    found = []
    config = EngineConfig(max_step_tokens=max(lengths) + 64, auto_floor=-1.0)
    with Engine(model, config) as engine:
        for length in lengths:
            times: dict[str, list[float]] = {"base": [], "choosing": [], "named": [], "auto": []}
            for number in range(rounds + 1):
                base, _ = timed(engine, ids[:length], None, f"base {number}")
                choosing, auto = timed(engine, ids[:length], "auto", f"auto {number}")
                _, named = timed(engine, ids[:length], "quantum", f"named {number}")
                if number:  # the first is a warm-up
                    for name, value in (("base", base), ("choosing", choosing), ("named", named), ("auto", auto)):
                        times[name].append(1000 * value)
            medians = {name: statistics.median(values) for name, values in times.items()}
            found.append({"prompt_tokens": length, **medians, "ratio": medians["choosing"] / medians["base"]})
    return found


def timed(engine: Engine, prompt: Sequence[int], adapters: str | None, salt: str) -> tuple[float, float]:
    """Seconds of the first step, and up to the first token; nothing is in the prefix cache."""
    request = Request(prompt, adapters=adapters, sampling=SamplingParams(max_tokens=1), cache_salt=salt)
    engine.add_request(request)
    start = time.perf_counter()
    deltas = engine.step()
    first = time.perf_counter() - start
    while not deltas:
        deltas = engine.step()
    return first, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=90, help="of each domain")
    parser.add_argument("--neutral", type=int, default=25, help="of each domain, in other words")
    parser.add_argument("--methods", type=int, default=25, help="questions of each domain for what else was tried")
    parser.add_argument("--ways", type=int, default=14, help="questions of each domain, and texts of each task")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="the rest is kept as it was measured")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    model = MultiLoraModel.from_pretrained(options.model, dtype=options.dtype)
    file = RESULTS / "auto_choice.json"
    kept = json.loads(file.read_text())["results"] if file.exists() and set(options.parts) != set(PARTS) else {}
    results: dict[str, Any] = kept
    if "ways" in options.parts:
        results["ways"] = measure_ways(model, options.ways)
    if "methods" in options.parts:
        results["methods"] = measure_methods(model, options.methods)
    if "choice" in options.parts:
        results |= measure_thousand(model, options)
    console.print(results)
    if not options.no_save:
        save("auto_choice", {name: value for name, value in vars(options).items() if name != "parts"}, results)


def measure_thousand(model: MultiLoraModel, options: argparse.Namespace) -> dict[str, Any]:
    """What is chosen among all adapters, and what it costs."""

    def tokens(prompts: Sequence[str]) -> list[list[int]]:
        return [prompt_tokens(model.tokenizer, prompt) for prompt in prompts]

    def states(prompts: Sequence[str]) -> Tensor:
        return last_states(model.base, tokens(prompts))

    train = {name: tokens(questions(name, "train", 64)) for name in DOMAINS}
    load(model, fit_centroids(model.base, train, background_tokens(model.tokenizer)), options.adapters)
    cost = measure_cost(model, options.lengths, options.rounds)
    console.print(cost)
    index = model.registry.auto
    asked = {name: questions(name, "test", options.questions) for name in DOMAINS}
    own = {name: states(prompts) for name, prompts in asked.items()}
    others = {name: states([neutral(q) for q in asked[name][: options.neutral]]) for name in DOMAINS}
    return {
        "cost": cost,
        "choice": measure_choice(index, own),
        "other wording": measure_choice(index, others),
        "floors": measure_floors(index, torch.cat(list(own.values())), states(ELSEWHERE)),
    }


if __name__ == "__main__":
    main()
