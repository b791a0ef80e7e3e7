"""Adapters as the loop trains them: the n-th micro-batches of all jobs are one list of rows."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from transformers import PreTrainedModel

from loraplex.residual.layers import AttentionLayers
from loraplex.residual.rows import ChainLink
from loraplex.training.adapters.job_state import JobState
from loraplex.training.adapters.reft import TrainableReft
from loraplex.training.core.config import TrainConfig
from loraplex.training.core.distributed import ProcessGroup
from loraplex.training.core.rng import Purpose, generator
from loraplex.training.core.trainer import Loss
from loraplex.training.data.examples import Example
from loraplex.training.forward.attention import fast_attention
from loraplex.training.forward.batch import FrozenSlot, TrainingRow, TrainingSlot, TrainingWeightProvider
from loraplex.training.forward.loss import LossComputer
from loraplex.training.forward.probe import can_share_prefixes
from loraplex.training.forward.reft_rows import ReftRows
from loraplex.training.forward.residual_rows import ResidualRows

Numbered = tuple[int, int, Example]  # job, number in the step, example


class AdapterTask:
    """Jobs side by side in one batch; rows share no trainable weight."""

    def __init__(
        self,
        base: PreTrainedModel,
        states: Sequence[JobState],
        config: TrainConfig,
        ranks: ProcessGroup,
        attention: AttentionLayers | None = None,  # needed for residuals
    ) -> None:
        self.states = states
        self._base = base
        self._ranks = ranks
        self._losses = LossComputer(
            base,
            len(states),
            tokens_per_forward=config.tokens_per_forward,
            share_prefixes=config.share_prefixes and can_share_prefixes(base),
            residuals=residual_rows(states, attention),
            interventions=reft_rows(states),
            checkpointing=config.gradient_checkpointing,
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        longest = max(len(e.ids) for state in self.states for e in (*state.data.train, *state.data.held_out))
        with fast_attention(self._base, longest):
            yield

    def accumulate_gradients(self, active: Sequence[int]) -> list[Loss]:
        examples = {}
        for index in active:
            state = self.states[index]
            examples[index] = state.data.examples_of_step(state.progress.step)
        scales = torch.zeros(len(self.states))
        for index in active:
            scales[index] = 1 / sum(len(example.answer) for example in examples[index])
        sums = torch.zeros(len(self.states), device=self._base.device)
        for micro_batch in self._micro_batches(examples):
            rows, bank = self._rows(micro_batch, with_dropout=True)
            sums += self._losses.accumulate_gradients(rows, bank, scales.to(self._base.device))
        losses = (self._ranks.add_up(sums).cpu() * scales).tolist()
        return [Loss(losses[index], sum(len(example.ids) for example in examples[index]), {}) for index in active]

    def evaluate(self, due: Sequence[int]) -> list[Loss]:
        held_out = {index: self.states[index].data.held_out for index in due}
        numbered = [(index, 0, example) for index in due for example in held_out[index]]
        rows, bank = self._rows(self._ranks.share(numbered), with_dropout=False)
        sums = self._ranks.add_up(self._losses.evaluate(rows, bank)).cpu()
        return [
            Loss(
                float(sums[index]) / sum(len(example.answer) for example in held_out[index]),
                sum(len(example.ids) for example in held_out[index]),
                {},
            )
            for index in due
        ]

    def _micro_batches(self, examples: Mapping[int, Sequence[Example]]) -> list[list[Numbered]]:
        """This process's share of each micro-batch: the n-th of every job together."""
        batches: list[list[Numbered]] = []
        for index, of_job in examples.items():
            size = self.states[index].job.steps.batch_size
            for number, example in enumerate(of_job):
                while len(batches) <= number // size:
                    batches.append([])
                batches[number // size].append((index, number, example))
        return [self._ranks.share(batch) for batch in batches]

    def _rows(
        self, batch: Sequence[Numbered], *, with_dropout: bool
    ) -> tuple[list[TrainingRow], TrainingWeightProvider]:
        """Rows with the slots that they go through; with dropout every row has its own, which draws for it alone."""
        slots = [TrainingSlot(state.parameters.slot_weights) for state in self.states]
        frozen: list[list[FrozenSlot]] = []
        for state in self.states:
            members = range(len(slots), len(slots) + len(state.frozen.loras))
            frozen.append([FrozenSlot(n, lora.weight) for n, lora in zip(members, state.frozen.loras, strict=True)])
            slots += [TrainingSlot(lora.slot_weights) for lora in state.frozen.loras]
        rows = []
        for index, number, example in batch:
            state, slot = self.states[index], index
            dropout = state.dropout if with_dropout else 0.0
            if dropout:
                counters = (state.progress.step, number)
                draw = generator(state.job.seed, Purpose.DROPOUT, *counters, device=self._base.device)
                slot = len(slots)
                slots.append(TrainingSlot(state.parameters.slot_weights, dropout, draw))
            gate = state.gate_before_user(number) if with_dropout else state.evaluated_gate_before_user
            is_moved = isinstance(state.parameters, TrainableReft)
            rows.append(TrainingRow(index, slot, example, bool(dropout), frozen[index], gate, is_moved))
        return rows, TrainingWeightProvider(slots)


def reft_rows(states: Sequence[JobState]) -> ReftRows | None:
    """The interventions that jobs' rows go through; None: no job trains any."""
    jobs = {
        index: partial(state.parameters.operations, state.name)
        for index, state in enumerate(states)
        if isinstance(state.parameters, TrainableReft)
    }
    return ReftRows(jobs) if jobs else None


def residual_rows(states: Sequence[JobState], attention: AttentionLayers | None) -> ResidualRows | None:
    """The residuals that each job's rows go through, those before the one in training and it; None: there are none."""
    chains = {}
    for index, state in enumerate(states):
        chain, trained = state.frozen.chain, state.parameters.residual
        if trained is not None:
            chain = (*chain, ChainLink(name=state.name, residual=trained))
        if chain:
            chains[index] = chain
    if not chains:
        return None
    assert attention is not None, "rows go through residuals, but the attention layers were not joined"
    return ResidualRows(chains, attention.num_heads)
