"""Experts that don't lean on the chat template: gates of the tokens before the first user turn's content."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.peft.reader import read_adapter
from loraplex.errors import ConfigError, DatasetError
from loraplex.layers.attach import AdaptableModel
from loraplex.residual.modules import ResidualConfig
from loraplex.training import AdapterJob, TrainConfig, train_adapters
from loraplex.training.adapters.setup import make_states
from loraplex.training.adapters.task import AdapterTask
from loraplex.training.core.distributed import ProcessGroup
from loraplex.training.data.examples import make_examples
from loraplex.training.data.first_user import BeforeFirstUser
from loraplex.training.data.records import Record
from tests.tiny_models import random_peft_adapter, tiny_model
from tests.training.tiny_jobs import tiny_job, tiny_tokenizer, write_records

OPENING = "<|im_start|>user\n"
# Longer openings too, so that rows of one batch differ, and several turns.
RECORDS = [
    [("user", "sort dcba"), ("assistant", "abcd")],
    [("system", "be short"), ("user", "sort fa"), ("assistant", "af"), ("user", "sort zy"), ("assistant", "yz")],
    [("user", "s"), ("assistant", "s")],
    [("user", "sort dcbb"), ("assistant", "bbcd"), ("user", "more"), ("assistant", "none")],
]


def data_file(folder: Path, turns: list[list[tuple[str, str]]] = RECORDS) -> Path:
    lines = [{"messages": [{"role": role, "content": text} for role, text in record]} for record in turns]
    return write_records(folder / "chats.jsonl", lines)


def job_of(
    folder: Path, turns: list[list[tuple[str, str]]] = RECORDS, *, dora: bool = False, **options: Any
) -> AdapterJob:
    start = random_peft_adapter(
        tiny_model("llama"),
        folder / "start",
        targets=("q_proj", "down_proj", "lm_head"),
        r=3,
        lora_alpha=6,
        options={"use_dora": dora},
    )
    defaults = {"batch_size": len(turns), "eval_fraction": 0, "max_steps": 1, "init_from": start}
    defaults |= {"lora": read_adapter(start).config, "data": data_file(folder, turns)}
    return tiny_job(folder, "expert", **(defaults | options))


def task_of(job: AdapterJob, folder: Path, *, share_prefixes: bool = True) -> AdapterTask:
    base = tiny_model("llama").requires_grad_(False)
    adaptable = AdaptableModel(base)
    states = make_states([job], base, adaptable, tiny_tokenizer())
    adaptable.attach(states[0].parameters.paths)
    config = TrainConfig(output=folder / "out", share_prefixes=share_prefixes, tokens_per_forward=120)
    return AdapterTask(base, states, config, ProcessGroup(base.device))


def before(messages: list[tuple[str, str]]) -> int:
    """One token a character, but the markers of turns."""
    system = sum(len(f"{role}\n{text}") + 3 for role, text in messages if role == "system")
    return system + len("user\n") + 1


def test_the_first_user_turn_is_found_in_the_template() -> None:
    tokenizer = tiny_tokenizer()
    chats = [tuple({"role": role, "content": text} for role, text in record) for record in RECORDS]
    records = [Record(place=str(number), messages=chat) for number, chat in enumerate(chats)]
    examples = make_examples([*records, Record(place="text", text="abc")], tokenizer, 256)
    assert [example.num_before_user for example in examples] == [*map(before, RECORDS), 0]
    assert tokenizer.decode(examples[0].ids[: before(RECORDS[0])]).replace(" ", "") == OPENING.replace(" ", "")
    assert make_examples(records, tokenizer, 20)[1].num_before_user == 0, "what is cut off is gone"
    assert BeforeFirstUser(tokenizer).count([{"role": "assistant", "content": "a"}], [1, 2]) == 0


def peft_gradient(job: AdapterJob, paths: Sequence[str], gates: list[float]) -> tuple[Tensor, float]:
    """By PEFT, with what every LoRA or DoRA adds multiplied by the gates of the tokens; one record at a time."""
    model = PeftModel.from_pretrained(copy.deepcopy(tiny_model("llama")), str(job.init_from), is_trainable=True).eval()
    mask: list[Tensor] = []

    def gate(module: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        base = module.base_layer(*args)
        return base + (y - base) * mask[0]

    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.register_forward_hook(gate)
    examples = make_examples(
        [
            Record(place=str(n), messages=tuple({"role": role, "content": text} for role, text in record))
            for n, record in enumerate(RECORDS)
        ],
        tiny_tokenizer(),
        256,
    )
    total, num_answers = torch.zeros(()), 0
    for record, example, value in zip(RECORDS, examples, gates, strict=True):
        mask[:] = [torch.ones(1, len(example.ids), 1)]
        mask[0][:, : before(record)] = value
        labels = torch.full((len(example.ids),), -100)
        labels[list(example.answer)] = torch.tensor(example.ids)[list(example.answer)]
        ids = torch.tensor([example.ids])
        loss = model(input_ids=ids, labels=labels[None]).loss
        total, num_answers = total + loss * len(example.answer), num_answers + len(example.answer)
    (total / num_answers).backward()
    factors = dict(model.named_parameters())
    flat = []
    for path in paths:
        (a,) = [p.grad for name, p in factors.items() if name.endswith(f"{path}.lora_A.default.weight")]
        (b,) = [p.grad for name, p in factors.items() if name.endswith(f"{path}.lora_B.default.weight")]
        assert a is not None
        assert b is not None
        flat += [a.flatten(), b.t().flatten()]
        flat += [p.grad for name, p in factors.items() if f"{path}.lora_magnitude_vector.default" in name]
    return torch.cat(flat), float(total.detach()) / num_answers


@pytest.mark.parametrize("share_prefixes", [True, False])
@pytest.mark.parametrize(("gate", "dora"), [(1.0, False), (0.0, False), (0.25, False), (0.25, True), (0.0, True)])
def test_gradient_equals_pefts_with_the_adapters_share_multiplied_by_the_gates(
    tmp_path: Path, gate: float, dora: bool, share_prefixes: bool
) -> None:
    job = job_of(tmp_path, gates_before_user=gate, dora=dora)
    task = task_of(job, tmp_path, share_prefixes=share_prefixes)
    (loss,) = task.accumulate_gradients([0])
    paths = task.states[0].parameters.paths
    expected, value = peft_gradient(job, paths, [gate] * len(RECORDS))
    found = task.states[0].optimizer.gradient
    assert loss.value == pytest.approx(value, rel=1e-5)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    if gate != 1:
        plain, _ = peft_gradient(job, paths, [1.0] * len(RECORDS))
        assert (plain - expected).norm() > 0.05 * plain.norm(), "the gates make no difference"


def test_prefixes_are_shared_where_all_records_begin_alike(tmp_path: Path) -> None:
    """On a batch that is large enough for it to pay: the same gradient as without."""
    turns = [[("user", f"{'long question ' * 3}{letter}"), ("assistant", letter * 3)] for letter in "abcdefghijkl"]
    for gate in (0.0, 0.25, "dropout"):
        job = job_of(tmp_path, turns, gates_before_user=gate, batch_size=12)
        gradients = []
        for share in (True, False):
            task = task_of(job, tmp_path, share_prefixes=share)
            task.accumulate_gradients([0])
            gradients.append(task.states[0].optimizer.gradient)
        assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


def test_dropout_draws_for_each_record_and_step_and_evaluates_without(tmp_path: Path) -> None:
    job = job_of(tmp_path, gates_before_user="dropout")
    task = task_of(job, tmp_path)
    state = task.states[0]
    drawn = [state.gate_before_user(number) for number in range(len(RECORDS))]
    (loss,) = task.accumulate_gradients([0])
    order = state.data.examples_of_step(0)
    numbers = [int(example.place.rsplit(":", 1)[1]) - 1 for example in order]
    gates = [drawn[numbers.index(number)] for number in range(len(RECORDS))]
    expected, value = peft_gradient(job, state.parameters.paths, gates)
    assert loss.value == pytest.approx(value, rel=1e-5)
    assert (state.optimizer.gradient - expected).norm() < 1e-4 * expected.norm()
    many = [state.gate_before_user(number) for number in range(200)]
    assert 60 < sum(many) < 140
    assert set(many) == {0.0, 1.0}
    state.progress.step = 1
    assert [state.gate_before_user(number) for number in range(200)] != many
    assert state.evaluated_gate_before_user == 1.0


def test_what_can_not_be_gated_is_refused(tmp_path: Path) -> None:
    for value in (1.5, -0.1, "zero", float("nan"), None):
        with pytest.raises(
            ConfigError, match=r"gates_before_user is .*; it must be a number from 0 to 1, or 'dropout'"
        ):
            job_of(tmp_path, gates_before_user=value)
    with pytest.raises(ConfigError, match="it trains a residual"):
        tiny_job(tmp_path, "r", lora=None, residual=ResidualConfig(r=2), gates_before_user=0.0)
    alora = LoraConfig(r=2, lora_alpha=2, target_modules=("q_proj",), alora_invocation_tokens=(5,))
    with pytest.raises(ConfigError, match="it trains an aLoRA"):
        tiny_job(tmp_path, "a", lora=alora, gates_before_user=0.0)
    job = tiny_job(tmp_path, "t", "text", gates_before_user=0.0)
    with pytest.raises(DatasetError, match=r"no record of .* has tokens before a user's turn"):
        train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[job], config=TrainConfig(output=tmp_path / "o"))
