"""A character tokenizer with a chat template, small files of records, and jobs for tiny models."""

import json
import random
import string
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from loraplex.adapters.config import LoraConfig
from loraplex.training import AdapterJob
from loraplex.training.core.config import compose, option_names, parts_of

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
Config = TypeVar("Config")
SPECIAL = ["<pad>", "<bos>", "<|im_start|>", "<|im_end|>", "<unk>"]


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a character, of the 128 that the tiny models know."""
    characters = sorted({*string.ascii_letters, *string.digits, *string.punctuation, " ", "\n"})
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = chat_template
    return fast


def records(form: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Sums of letters, as conversations, prompts with completions, or texts of varying length."""
    draw = random.Random(seed)
    made: list[dict[str, Any]] = []
    for _ in range(count):
        word = "".join(draw.choices("abcdef", k=draw.randint(2, 9)))
        question, answer = f"sort {word}", "".join(sorted(word))
        if form == "messages":
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            made.append({"messages": turns * draw.randint(1, 2)})
        elif form == "prompt":
            made.append({"prompt": question + "=", "completion": answer})
        else:
            made.append({"text": f"{word} {answer}"})
    return made


def pairs() -> list[dict[str, Any]]:
    """Prompts with the letters in order, against the letters as they were; texts and conversations."""
    words = ["cab", "fed", "dabc", "ecab", "bca", "fade", "aced", "dba", "cfa", "ebd", "bfa", "deca"]
    made: list[dict[str, Any]] = []
    for number, word in enumerate(words):
        good, bad = "".join(sorted(word)), word
        if number % 2:
            made.append({"prompt": f"sort {word}=", "chosen": good, "rejected": bad + "!"})
        else:
            user = {"role": "user", "content": f"sort {word}"}
            answers = [{"role": "assistant", "content": answer} for answer in (good, bad)]
            made.append({"chosen": [user, answers[0]], "rejected": [user, answers[1]]})
    return made


def rewarded() -> list[dict[str, Any]]:
    return [
        {"prompt": f"{number}=", "completion": "ab" * (number % 3 + 1), "reward": [1.0, -0.25, 0.0, 2.0][number % 4]}
        for number in range(12)
    ]


def write_records(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def tiny_job(folder: Path, name: str, form: str = "messages", **options: Any) -> AdapterJob:
    """A job with a data file of its own in `folder`; `options` replace the defaults here."""
    seed = sum(map(ord, name))
    data = write_records(folder / f"{name}.jsonl", records(form, 24, seed))
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj"))
    defaults: dict[str, Any] = {
        "data": data,
        "lora": lora,
        "learning_rate": 5e-3,
        "batch_size": 4,
        "seed": seed,
        "eval_every": 5,
        "max_length": 256,
    }
    if "epochs" not in options:
        defaults["max_steps"] = 10
    return compose(AdapterJob, {"name": name} | defaults | options, f"job {name!r}")


def changed(config: Config, **options: Any) -> Config:
    """The config with other options, whichever part of it has them."""
    parts = {}
    for name, part in parts_of(type(config)).items():
        own = {option: options.pop(option) for option in option_names(part) if option in options}
        parts[name] = changed(getattr(config, name), **own)
    return replace(config, **parts, **options)  # type: ignore[type-var]
