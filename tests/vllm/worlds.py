"""A tiny Llama as a folder with adapters and mixtures, what PEFT makes of it, and vLLM engines on it."""

import functools
import gc
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel

from loraplex.xlora.config import XLoraConfig
from loraplex.xlora.formats.write_folder import write_mixture_folder
from tests.parity.oracle import PeftOracle
from tests.parity.test_xlora import GRID
from tests.parity.xlora_oracle import peft_xlora
from tests.tiny_models import ARCHITECTURES, LLAMA_TARGETS, VOCAB_SIZE, random_peft_adapter

TOP = 5  # logprobs that are compared
TOLERANCE = 1e-3
VOCAB = VOCAB_SIZE
HIDDEN = 128  # heads of 32, the smallest that vLLM's CPU attention has
LINK = "protein:0.7+materials:0.3"
CHOICES = [None, "protein", LINK, *(f"mix{i}" for i in range(len(GRID))), None]


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, and the largest log-probabilities at each of them."""

    tokens: list[int]
    logprobs: list[dict[int, float]]


@dataclass
class World:
    """A base model in a folder, adapters beside it, and the oracle's answers, which are computed once."""

    folder: Path
    base: PreTrainedModel
    adapters: dict[str, Path]
    mixtures: dict[str, Callable[[], Any]] = field(default_factory=dict)  # what makes PEFT's model of each
    answers: dict[str, Answer] = field(default_factory=dict)

    @property
    def model(self) -> str:
        return str(self.folder / "model")

    @property
    def named(self) -> Path:
        """The folder whose subfolders the plugin serves."""
        return self.folder / "named"

    def add_mixture(self, name: str, config: XLoraConfig, experts: Sequence[str], seed: int = 0) -> None:
        """PEFT's mixture with a random head, as a folder."""
        folders = {expert: self.adapters[expert] for expert in experts}
        peft_folders = {str(i): path for i, path in enumerate(folders.values())}
        self.mixtures[name] = functools.partial(peft_xlora, self.base, peft_folders, config, seed=seed)
        write_mixture_folder(
            self.named / name,
            layout="peft",
            config=config,
            hidden_size=self.base.config.hidden_size,
            head_state=self.mixtures[name]().base_model.internal_xlora_classifier.state_dict(),
            experts=folders,
            base_model_name=None,
        )

    def expected(self, choice: str | None, prompt: Sequence[int], num_tokens: int) -> Answer:
        """PEFT's greedy answer for one row, whole sequences at every step; remembered."""
        key = json.dumps([choice, list(prompt), num_tokens])
        if key not in self.answers:
            self.answers[key] = self._compute(choice, prompt, num_tokens)
        return self.answers[key]

    @torch.no_grad()
    def _compute(self, choice: str | None, prompt: Sequence[int], num_tokens: int) -> Answer:
        ids, answer = list(prompt), Answer([], [])
        mixture = self.mixtures[choice]() if choice in self.mixtures else None
        oracle = None
        if choice is not None and mixture is None:
            oracle = PeftOracle(self.base, self.adapters)
            if choice not in self.adapters:
                pairs = [part.partition(":") for part in choice.split("+")]
                oracle.link("link", [(name, float(weight or 1)) for name, _, weight in pairs])
        for _ in range(num_tokens):
            tensor = torch.tensor(ids)
            if mixture is not None:
                logits = mixture(input_ids=tensor[None], use_cache=False).logits[0]
            elif oracle is not None:
                logits = oracle.logits(choice if choice in self.adapters else "link", tensor, torch.ones_like(tensor))
            else:
                logits = self.base(input_ids=tensor[None]).logits[0]
            logprobs = torch.log_softmax(logits[-1].float(), dim=-1)
            best = logprobs.topk(TOP)
            answer.tokens.append(int(best.indices[0]))
            answer.logprobs.append(dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
            ids.append(answer.tokens[-1])
        return answer


def make_base(architecture: str = "llama", *, num_layers: int = 2, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random model of one of the tiny architectures, as large as vLLM's CPU attention wants."""
    config = ARCHITECTURES[architecture].config()
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": num_layers, "max_position_embeddings": 512}
    if getattr(config, "head_dim", None) is not None:
        sizes["head_dim"] = HIDDEN // config.num_attention_heads
    config = type(config)(**{**config.to_dict(), **sizes, **settings})
    torch.manual_seed(seed)
    base = ARCHITECTURES[architecture].model_class(config).eval()
    for parameter in base.parameters():
        if parameter.ndim == 1:  # biases and norms, which start as zeros and ones
            torch.nn.init.normal_(parameter.data, parameter.data.mean().item(), 0.1)
    base.set_attn_implementation("eager")  # the one that has Gemma 2's soft caps
    return base


def make_world(folder: Path, base: PreTrainedModel | None = None, targets: Sequence[str] = LLAMA_TARGETS) -> World:
    """A base model, and adapters "protein", "materials" and "chemistry" of different ranks and modules."""
    base = make_base(initializer_range=0.1) if base is None else base
    base.save_pretrained(folder / "model")
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "model")
    shapes: dict[str, dict[str, Any]] = {
        "protein": {"targets": targets, "r": 4, "lora_alpha": 4},
        "materials": {"targets": targets[:4], "r": 8, "options": {"use_rslora": True}},
        "chemistry": {"targets": targets[::3], "r": 3, "lora_alpha": 6},
    }
    adapters = {
        name: random_peft_adapter(base, folder / "named" / name, seed=i + 1, **shape)
        for i, (name, shape) in enumerate(shapes.items())
    }
    return World(folder, base, adapters)


def grid_world(folder: Path, base: PreTrainedModel | None = None) -> World:
    """The tiny Llama, or another base, with a mixture for each head of the grid, "mix0", "mix1", ..."""
    return add_mixtures(make_world(folder, base), range(len(GRID)))


def add_mixtures(world: World, chosen: Iterable[int]) -> World:
    """The grid's mixtures with these numbers, of all adapters."""
    for i in chosen:
        world.add_mixture(f"mix{i}", GRID[i], list(world.adapters), seed=i)
    return world


def make_server_world(folder: Path) -> World:
    """The tiny Llama with two of the grid's mixtures."""
    return add_mixtures(make_world(folder), (1, 6))


def prompts(num: int, length: int = 12, seed: int = 0) -> list[list[int]]:
    """Random prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length + i % 5,), generator=generator).tolist() for i in range(num)]


@contextmanager
def engine(world: World, options: Mapping[str, Any] | None = None, **settings: Any) -> Iterator[Any]:
    """A vLLM engine in this process on the world's model; `options` None leaves the plugin off."""
    from vllm import LLM

    llm = LLM(**engine_settings(world, options, **settings))
    try:
        yield llm
    finally:
        shut_down(llm)


def engine_settings(world: World, options: Mapping[str, Any] | None, **settings: Any) -> dict[str, Any]:
    defaults = {
        "model": world.model,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "enable_lora": True,
        "max_lora_rank": 16,
        "max_loras": 4,
        "max_cpu_loras": 16,
        "max_model_len": 256,
        "max_num_seqs": 16,
        "max_logprobs": 2 * TOP,
        "num_gpu_blocks_override": 256,
        "block_size": 32,
        "disable_log_stats": True,
    }
    if options is not None:
        defaults["additional_config"] = {"loraplex": {"folder": str(world.named), **options}}
    return {**defaults, **settings}


def shut_down(llm: Any) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    core = llm.llm_engine.engine_core
    core.shutdown()
    del llm, core
    gc.collect()
    cleanup_dist_env_and_memory()


_ids: dict[tuple[str, str], int] = {}  # vLLM knows an adapter by its number: one for each, in all batches of an engine


def lora_request(choice: str | None, paths: Mapping[str, str]) -> Any:
    """What a row asks for; `paths` where a choice is no name of the plugin's."""
    from vllm.lora.request import LoRARequest

    if choice is None:
        return None
    path = paths.get(choice, choice)
    return LoRARequest(choice, _ids.setdefault((choice, path), len(_ids) + 1), path)


def generate(
    llm: Any,
    rows: Sequence[tuple[str | None, Sequence[int]]],
    num_tokens: int,
    paths: Mapping[str, str] | None = None,
) -> list[Answer]:
    """Greedy answers of one batch, row by row its choice and its prompt; `paths` where a choice is no name."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=num_tokens, logprobs=2 * TOP, ignore_eos=True, detokenize=False)
    outputs = llm.generate(
        [{"prompt_token_ids": list(prompt)} for _, prompt in rows],
        params,
        lora_request=[lora_request(choice, paths or {}) for choice, _ in rows],
        use_tqdm=False,
    )
    return [answer_of(output.outputs[0]) for output in outputs]


def answer_of(output: Any) -> Answer:
    logprobs = [{token: entry.logprob for token, entry in step.items()} for step in output.logprobs]
    return Answer(list(output.token_ids), logprobs)


@dataclass
class Difference:
    """How far answers are from the oracle's."""

    num_tokens: int = 0
    num_wrong: int = 0
    largest: float = 0.0  # of the differences of the oracle's top log-probabilities, up to the first wrong token

    def add(self, actual: Answer, expected: Answer) -> None:
        right = True
        for token, wanted, found, top in zip(
            actual.tokens, expected.tokens, actual.logprobs, expected.logprobs, strict=True
        ):
            self.num_tokens += 1
            self.num_wrong += token != wanted
            if right:
                below = min(found.values())  # a token that is not shown is below: by more than what is counted
                self.largest = max(self.largest, *(abs(found.get(t, below) - p) for t, p in top.items()))
            right = right and token == wanted

    @property
    def is_none(self) -> bool:
        return self.num_wrong == 0 and self.largest <= TOLERANCE


def difference(
    llm: Any,
    world: World,
    rows: Sequence[tuple[str | None, Sequence[int]]],
    num_tokens: int,
    paths: Mapping[str, str] | None = None,
) -> Difference:
    """Compare a batch's answers with PEFT's."""
    found = Difference()
    for (choice, prompt), answer in zip(rows, generate(llm, rows, num_tokens, paths), strict=True):
        found.add(answer, world.expected(choice, prompt, num_tokens))
    return found


def engine_core(llm: Any) -> Any:
    """The engine's core, in this process."""
    return llm.llm_engine.engine_core.engine_core


def lora_manager(llm: Any) -> Any:
    """The worker's LoRA manager."""
    return engine_core(llm).model_executor.driver_worker.worker.model_runner.lora_manager


def scaling_pass(llm: Any) -> Any:
    """What runs X-LoRA's first pass."""
    return engine_core(llm).model_executor.driver_worker.worker.model_runner.loraplex_scaling_pass


@dataclass
class Calls:
    """How often a method was called, and what it returned."""

    count: int = 0
    results: list[Any] = field(default_factory=list)


def counted(thing: Any, method: str) -> Calls:
    """Count the calls of an object's method from now on."""
    calls, called = Calls(), getattr(thing, method)

    def counting(*args: Any, **kwargs: Any) -> Any:
        result = called(*args, **kwargs)
        calls.count += 1
        calls.results.append(result)
        return result

    setattr(thing, method, counting)
    return calls
