"""What one variant must show in each feature: every row equal to its oracle, alone and in a batch, or a refusal."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraplex import MultiLoraModel, XLoraConfig
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import LoraplexError
from loraplex.residual.modules import LinkedResidual, SteeringVector
from tests.architectures.oracle import (
    LINK,
    MixtureOracle,
    Oracle,
    ResidualOracle,
    Steps,
    generation,
    greedy,
    inputs_of,
    is_dynamic,
    whole_steps,
    write_adapters,
)
from tests.architectures.variants import W, kind_of, make_model
from tests.residual.tiny_residuals import random_linked, random_vector

CHOICES = (None, "0", "1", LINK)
# Past every window, chunk and rope threshold of the variants (16 to 24), within one, and far below.
LENGTHS = (2 * W + 9, W + 3, W - 4, 2 * W)
NUM_NEW = 8
TOLERANCE = 1e-4  # of the logits' range
IDS = (3, 110)  # below are special tokens, above are those of images


@dataclass(frozen=True)
class Outcome:
    """What a feature does with a variant."""

    refusal: str | None = None  # None: every row is equal to its oracle

    @property
    def word(self) -> str:
        return "equal" if self.refusal is None else "refused"


class Case:
    """One variant with its adapters, and what every row must get."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.kind = kind_of(name)
        self._folder = tempfile.TemporaryDirectory()
        self.folders = write_adapters(name, Path(self._folder.name))
        draw = torch.Generator().manual_seed(0)
        self.rows = [torch.randint(*IDS, (length,), generator=draw) for length in LENGTHS]

    def model(self) -> MultiLoraModel:
        """A fresh model with both adapters. Raises what loading raises."""
        model = MultiLoraModel(make_model(self.name))
        for adapter, folder in self.folders.items():
            model.load_adapter(adapter, folder)
        return model

    @cached_property
    def is_dynamic(self) -> bool:
        """Whether positions change with every token, so that nothing with a cache is PEFT's X-LoRA."""
        return any(map(is_dynamic, self.oracle.base.modules()))

    @cached_property
    def caches_exactly(self) -> bool:
        """Whether transformers' own answer with a cache is the one that whole passes give, as it should be."""
        row, base = self.rows[0], self.oracle.base
        whole = whole_steps(lambda ids: self.oracle.logits(None, ids), row, NUM_NEW)
        return largest_error(greedy(base, row, None, NUM_NEW), whole) < 1e-3

    @cached_property
    def oracle(self) -> Oracle:
        return Oracle(self.name, self.folders)

    @cached_property
    def batch(self) -> tuple[Tensor, Tensor]:  # [rows, tokens] each
        """The rows, padded on the left: ids and mask."""
        longest = max(LENGTHS)
        ids = torch.zeros(len(self.rows), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(self.rows):
            ids[row, longest - len(tokens) :] = tokens
            mask[row, longest - len(tokens) :] = 1
        return ids, mask

    def inputs(self, rows: slice | Sequence[int] = slice(None)) -> dict[str, Tensor]:
        ids, mask = self.batch
        return inputs_of(self.kind == "seq2seq", ids[rows], mask[rows])


# Features: each raises AssertionError where a row is wrong, LoraplexError where the variant is refused.


@torch.no_grad()
def check_forward(case: Case) -> None:
    """A padded batch of base, adapter and linked rows against PEFT, and each row alone without padding."""
    model = case.model()
    together = model(**case.inputs(), adapters=list(CHOICES)).logits
    ids, mask = case.batch
    for row, choice in enumerate(CHOICES):
        expected = case.oracle.logits(choice, ids[row], mask[row])
        shown = slice(None) if case.kind == "seq2seq" else mask[row].bool()
        assert_close(together[row][shown], expected[shown], f"forward of {choice} in a batch")
        alone = model(**inputs_of(case.kind == "seq2seq", case.rows[row][None], None), adapters=[choice]).logits[0]
        assert_close(alone, case.oracle.logits(choice, case.rows[row]), f"forward of {choice} alone")
    assert_far(case.oracle.logits(None, case.rows[0]), case.oracle.logits("0", case.rows[0]), "the adapter")


@torch.no_grad()
def check_generate(case: Case) -> None:
    """The same rows' greedy answers and their logits."""
    model = case.model()
    ids, mask = case.batch
    out = model.generate(ids, attention_mask=mask, adapters=list(CHOICES), **generation(NUM_NEW))
    for row, choice in enumerate(CHOICES):
        expected = case.oracle.steps(choice, ids[row], mask[row], NUM_NEW)
        assert_same_steps(steps_of(out, row), expected, f"generate of {choice} in a batch")
        alone = model.generate(
            case.rows[row][None],
            attention_mask=torch.ones(1, LENGTHS[row], dtype=torch.int64),
            adapters=[choice],
            **generation(NUM_NEW),
        )
        expected = case.oracle.steps(choice, case.rows[row], None, NUM_NEW)
        assert_same_steps(steps_of(alone, 0), expected, f"generate of {choice} alone")


@torch.no_grad()
def check_mixture(case: Case) -> None:
    """An X-LoRA beside base and adapter rows: forward, and generate with its two caches, against two whole passes."""
    model = case.model()
    model.create_mixture("mix", ["0", "1"], XLoraConfig(layerwise_scalings=True), seed=3)
    head = model.mixtures.get("mix").head
    for parameter in head.parameters():
        parameter.data.mul_(3)  # so that scalings differ from token to token
    oracle = MixtureOracle(case.name, case.folders, head)
    rows = [case.rows[0], case.rows[0].flip(0), case.rows[0].roll(5)]
    ids, choices = torch.stack(rows), ["mix", None, "mix"]
    logits = model(**inputs_of(case.kind == "seq2seq", ids, None), adapters=choices).logits
    for row, choice in enumerate(choices):
        expected = oracle.logits(rows[row]) if choice == "mix" else case.oracle.logits(None, rows[row])
        assert_close(logits[row], expected, f"forward of {choice}")
    assert_far(oracle.logits(rows[0]), case.oracle.logits(None, rows[0]), "the mixture")
    if case.kind == "mlm":
        return
    options = {**generation(NUM_NEW), **({} if case.caches_exactly else {"use_cache": False})}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), adapters=choices, **options)
    for row in (0, 2):
        expected = oracle.steps(rows[row], NUM_NEW)
        rounding = rounding_of(oracle.logits, rows[row], expected)
        assert_same_steps(steps_of(out, row), expected, "generate of a mixture", rounding)


@torch.no_grad()
def check_engine(case: Case) -> None:
    """Requests of different lengths at once, their prompts in chunks, against transformers' and PEFT's generate."""
    model = case.model()
    model.create_mixture("mix", ["0", "1"], XLoraConfig(layerwise_scalings=True), seed=3)
    mixture = MixtureOracle(case.name, case.folders, model.mixtures.get("mix").head)
    choices = (*CHOICES, None, *(() if case.is_dynamic else ("mix",)))
    prompts = [*case.rows, case.rows[1].flip(0), case.rows[0].flip(0)][: len(choices)]
    sampling = SamplingParams(max_tokens=NUM_NEW, ignore_eos=True, logprobs=1)
    requests = [
        Request(prompt.tolist(), adapters=choice, sampling=sampling)
        for prompt, choice in zip(prompts, choices, strict=True)
    ]
    with Engine(model, EngineConfig(cache_bytes=2**22, max_step_tokens=W, max_length=3 * W + 9)) as engine:
        results = engine.generate(requests)
        again = engine.generate(requests[:2])  # whose prompts the prefix cache knows
    for prompt, choice, result in zip(prompts + prompts[:2], choices + choices[:2], results + again, strict=True):
        assert result.error is None, f"engine, {choice}: {result.error}"
        assert result.logprobs is not None, "log probabilities were asked for"
        expected = (
            mixture.steps(prompt, NUM_NEW) if choice == "mix" else case.oracle.steps(choice, prompt, None, NUM_NEW)
        )
        chosen = [step.logprob for step in result.logprobs]
        assert_same_answer(list(result.token_ids), chosen, expected, f"engine, {choice}, {len(prompt)} tokens")


@torch.no_grad()
def check_engine_in_bfloat16(case: Case) -> None:
    """The engine's log probabilities are as near to those of float32 as the model's own in bfloat16.

    All have the weights that bfloat16 holds. How far rounding may lead is taken from the model itself, over the tokens
    that the engine chose.
    """
    model = MultiLoraModel(make_model(case.name).to(torch.bfloat16))
    for adapter, folder in case.folders.items():
        model.load_adapter(adapter, folder)
    sampling = SamplingParams(max_tokens=2 * NUM_NEW, ignore_eos=True, logprobs=1)
    requests = [
        Request(prompt.tolist(), adapters=choice, sampling=sampling) for choice in (None, "0") for prompt in case.rows
    ]
    with Engine(model, EngineConfig(cache_bytes=2**22, max_step_tokens=W, max_length=4 * W)) as engine:
        results = engine.generate(requests)
    exact = Oracle(case.name, case.folders, dtype=torch.bfloat16)
    rounded = Oracle(case.name, case.folders, dtype=torch.bfloat16, runs_in=torch.bfloat16)
    errors, noise = [], []
    for request, prompt, result in zip(requests, (*case.rows, *case.rows), results, strict=True):
        assert result.error is None, f"engine in bfloat16: {result.error}"
        exactly, own = (
            oracle.logits_of_answer(request.adapters, prompt, result.token_ids)
            .log_softmax(-1)
            .gather(1, torch.tensor(result.token_ids)[:, None])[:, 0]
            for oracle in (exact, rounded)
        )
        told = torch.tensor([step.logprob for step in result.logprobs or ()])
        errors.append((told - exactly).abs())
        noise.append((own - exactly).abs())
    bound, found = 4 * torch.cat(noise).max().item(), torch.cat(errors)
    # Where experts are chosen, a last bit may choose another one.
    num_free = len(found) // 50 if any("expert" in path for path, _ in rounded.base.named_modules()) else 0
    worst = found.sort(descending=True).values[num_free].item()
    assert worst <= bound, f"engine in bfloat16: off by {worst:.2g}, the model itself by {bound / 4:.2g}"


@torch.no_grad()
def check_residual(case: Case) -> None:
    """Vectors and linked residuals beside rows that ask for nothing; those are the base model's to the bit."""
    model = MultiLoraModel(make_model(case.name))
    layers = model.registry.linked.layers
    inputs = case.inputs([0, 0, 1, 2])
    expected = make_model(case.name)(**inputs).logits
    residuals: dict[str, LinkedResidual | SteeringVector] = {
        "v": random_vector(layers, 1),
        "r": random_linked(layers, 2),
    }
    for name, residual in residuals.items():
        model.load_residual(name, residual)
    oracle = ResidualOracle(case.name, layers.layers)
    logits = model(**inputs, adapters=[None, "v", None, "r"]).logits
    for row in (0, 2):
        assert logits[row].equal(expected[row]), "a row that asks for nothing isn't the base model's to the bit"
    for row, name in ((1, "v"), (3, "r")):
        padded, shown = inputs["input_ids"][row], inputs["attention_mask"][row]
        tokens = padded[shown.bool()]
        wanted = oracle.logits(residuals[name], padded, shown)[shown.bool()]
        assert_close(logits[row][shown.bool()], wanted, f"forward of residual {name}")
        assert_far(wanted, expected[row][shown.bool()], f"residual {name}")
        alone = model(tokens[None], adapters=[name]).logits[0]
        assert_close(alone, oracle.logits(residuals[name], tokens), f"forward of residual {name} alone")
        if case.kind != "mlm":
            out = model.generate(
                tokens[None],
                attention_mask=torch.ones(1, len(tokens)),
                adapters=[name],
                use_cache=case.caches_exactly,  # as the oracle has none
                **generation(NUM_NEW),
            )
            steps = oracle.steps(residuals[name], tokens, NUM_NEW)
            rounding = rounding_of(partial(oracle.logits, residuals[name]), tokens, steps)
            assert_same_steps(steps_of(out, 0), steps, f"generate of residual {name}", rounding)


FEATURES: Mapping[str, Callable[[Case], None]] = {
    "forward": check_forward,
    "generate": check_generate,
    "mixture": check_mixture,
    "engine": check_engine,
    "engine in bfloat16": check_engine_in_bfloat16,
    "residual": check_residual,
}


def outcome(case: Case, feature: str) -> Outcome:
    """Run one feature. Raises AssertionError for a wrong row, and whatever isn't a typed refusal."""
    try:
        FEATURES[feature](case)
    except LoraplexError as error:
        return Outcome(refusal=_first_sentence(str(error)))
    return Outcome()


def _first_sentence(message: str) -> str:
    sentence, _, _ = message.partition(". ")
    return sentence.rstrip(".")


# Comparisons


def steps_of(out: Any, row: int) -> Steps:
    """One row of what generate returned."""
    tokens = out.sequences[row, -len(out.logits) :].tolist()
    return tokens, torch.stack(out.logits)[:, row].float()


def largest_error(actual: Steps, expected: Steps) -> float:
    """Of the logits' range, up to the first token that differs."""
    largest = 0.0
    for ours, theirs, one, other in zip(actual[0], expected[0], actual[1], expected[1], strict=True):
        largest = max(largest, ((one - other).abs().max() / (other.max() - other.min())).item())
        if ours != theirs:
            break
    return largest


def rounding_of(logits_of: Callable[[Tensor], Tensor], ids: Tensor, steps: Steps) -> float:
    """How far the oracle's own logits of an answer move if they are computed in one pass."""
    whole = logits_of(torch.cat([ids, ids.new_tensor(steps[0])]))[len(ids) - 1 : -1]
    return largest_error((steps[0], whole), steps)


def assert_close(actual: Tensor, expected: Tensor, label: str, tolerance: float = TOLERANCE) -> None:
    """Equal to `tolerance` of the expected logits' range."""
    actual, expected = actual.float(), expected.float()
    assert actual.shape == expected.shape, f"{label}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    span = (expected.max() - expected.min()).item()
    error = (actual - expected).abs().max().item()
    assert error <= tolerance * span, f"{label}: off by {error / span:.1e} of the logits' range"


def assert_far(one: Tensor, other: Tensor, what: str) -> None:
    """What is tested makes a difference."""
    span = (other.max() - other.min()).item()
    assert (one - other).abs().max().item() > 100 * TOLERANCE * span, f"{what} makes no difference"


def assert_same_steps(actual: Steps, expected: Steps, label: str, rounding: float = 0.0) -> None:
    """The same tokens and logits, up to a token where the best two logits are a tie.

    `rounding` is what the last bits do to the oracle itself, where that is known to be much.
    """
    tolerance = min(max(TOLERANCE, 8 * rounding), 10 * TOLERANCE)
    for step, (ours, theirs) in enumerate(zip(actual[0], expected[0], strict=True)):
        assert_close(actual[1][step], expected[1][step], f"{label}, token {step}", tolerance)
        if ours != theirs:
            assert_tie(expected[1][step], ours, theirs, f"{label}, token {step}")
            return


def assert_same_answer(tokens: Sequence[int], logprobs: Sequence[float], expected: Steps, label: str) -> None:
    """The same tokens and log probabilities, up to a tie."""
    assert len(tokens) == len(expected[0]), f"{label}: {len(tokens)} tokens instead of {len(expected[0])}"
    for step, (ours, theirs) in enumerate(zip(tokens, expected[0], strict=True)):
        logits = expected[1][step]
        span = (logits.max() - logits.min()).item()
        error = abs(logprobs[step] - torch.log_softmax(logits, dim=0)[ours].item())
        assert error <= 2 * TOLERANCE * span, (
            f"{label}, token {step}: log probability off by {error:.1e}, range {span:.1f}"
        )
        if ours != theirs:
            assert_tie(logits, ours, theirs, f"{label}, token {step}")
            return


def assert_tie(logits: Tensor, ours: int, theirs: int, label: str) -> None:
    span = (logits.max() - logits.min()).item()
    gap = (logits[theirs] - logits[ours]).abs().item()
    assert gap <= TOLERANCE * span, f"{label} is {ours} instead of {theirs}, {gap / span:.1e} of the range apart"
