"""Adapters as the loop trains them: the n-th micro-batches of all jobs are one list of rows."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.errors import ConfigError
from loraplex.residual.layers import AttentionLayers
from loraplex.residual.rows import ChainLink
from loraplex.training.adapters.dora import pass_gradients_on, refresh_derived
from loraplex.training.adapters.job_state import JobState
from loraplex.training.adapters.objectives import PairSums, References, pair_losses, perplexity
from loraplex.training.adapters.reft import TrainableReft
from loraplex.training.core.config import TrainConfig
from loraplex.training.core.distributed import ProcessGroup
from loraplex.training.core.rng import Purpose, generator
from loraplex.training.core.sharding import all_layers_run_backward
from loraplex.training.core.trainer import Loss
from loraplex.training.data.examples import Example
from loraplex.training.forward.batch import FrozenSlot, TrainingRow, TrainingSlot, TrainingWeightProvider
from loraplex.training.forward.fast_passes import fast_passes
from loraplex.training.forward.loss import LossComputer
from loraplex.training.forward.probe import can_share_prefixes, check_packing
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
        self._packing = config.packing
        if config.packing:
            _check_packing(base, states)
        self._losses = LossComputer(
            base,
            len(states),
            tokens_per_forward=config.tokens_per_forward,
            share_prefixes=config.share_prefixes
            and not (config.fsdp and not config.packing)
            and can_share_prefixes(base),
            residuals=residual_rows(states, attention),
            interventions=reft_rows(states),
            checkpointing=config.gradient_checkpointing,
            packing=config.packing,
            sharded_over=ranks if config.fsdp else None,
        )
        self._is_sharded = config.fsdp
        # Of a sharded base: a process whose share of a micro-batch has no pairs runs the passes of the others.
        self._scores_together = config.fsdp and any(state.job.loss == "dpo" for state in states)
        self._references = self._score_references()

    @contextmanager
    def running(self) -> Iterator[None]:
        together = all_layers_run_backward(self._base) if self._is_sharded else nullcontext()
        with together, fast_passes(self._base, self._longest, packing=self._packing):
            yield

    @property
    def _longest(self) -> int:
        examples = (e for state in self.states for e in (*state.data.train, *state.data.held_out))
        return max(len(one.ids) for example in examples for one in example.both)

    def accumulate_gradients(self, active: Sequence[int]) -> list[Loss]:
        examples = {}
        for index in active:
            state = self.states[index]
            examples[index] = state.data.examples_of_step(state.progress.step)
        scales = torch.zeros(len(self.states))
        for index in active:
            is_dpo = self.states[index].job.loss == "dpo"
            scales[index] = 1 / (
                len(examples[index]) if is_dpo else sum(len(example.answer) for example in examples[index])
            )
        refresh_derived([self.states[index] for index in active])
        sums = torch.zeros(len(self.states), device=self._base.device)
        pairs = PairSums(len(self.states))
        for micro_batch in self._micro_batches(examples):
            weights = self._pair_weights(micro_batch, pairs)
            rows, bank = self._rows(micro_batch, with_dropout=True, weights=weights)
            sums += self._losses.accumulate_gradients(rows, bank, scales.to(self._base.device))
        pass_gradients_on([self.states[index] for index in active])
        losses = (self._ranks.add_up(sums).cpu() * scales).tolist()
        pairs = pairs.added_up(self._ranks, self._base.device)
        return [self._step_loss(index, losses[index], examples[index], pairs) for index in active]

    def _step_loss(self, index: int, loss: float, examples: Sequence[Example], pairs: PairSums) -> Loss:
        num_tokens = sum(example.num_tokens for example in examples)
        if self.states[index].job.loss != "dpo":
            return Loss(loss, num_tokens, {})
        return Loss(pairs.loss(index, len(examples)), num_tokens, pairs.details(index, len(examples)))

    def evaluate(self, due: Sequence[int]) -> list[Loss]:
        refresh_derived([self.states[index] for index in due])
        numbered = [(index, 0, example) for index in due for example in self.states[index].data.held_out]
        own = self._ranks.share(numbered)
        rows, bank = self._rows(own, with_dropout=False)
        scores = self._losses.score(rows, bank)
        pairs = PairSums(len(self.states))
        self._pairs_of(own, scores.losses, pairs)
        sums = torch.zeros(len(self.states), 3)  # weighted loss, loss, records answered exactly
        for row, loss, num_right in zip(rows, scores.losses.tolist(), scores.num_right.tolist(), strict=True):
            is_exact = num_right == len(row.example.answer)
            sums[row.job] += torch.tensor([row.weight * loss, loss, float(is_exact)])
        sums = self._ranks.add_up(sums.to(self._base.device)).cpu()
        pairs = pairs.added_up(self._ranks, self._base.device)
        return [self._evaluated(index, sums[index].tolist(), pairs) for index in due]

    def _evaluated(self, index: int, sums: Sequence[float], pairs: PairSums) -> Loss:
        held_out = self.states[index].data.held_out
        num_tokens = sum(example.num_tokens for example in held_out)
        if self.states[index].job.loss == "dpo":
            return Loss(pairs.loss(index, len(held_out)), num_tokens, pairs.details(index, len(held_out)))
        weighted, plain, num_exact = sums
        num_answers = sum(len(example.answer) for example in held_out)
        exact = num_exact / len(held_out)
        details = {"perplexity": perplexity(plain / num_answers), "exact_match": exact}
        return Loss(weighted / num_answers, num_tokens, details, exact)

    def _score_references(self) -> References:
        """The pairs that the run meets under the reference: before a checkpoint replaces what `init_from` has."""
        needed = [
            (index, 0, pair)
            for index, state in enumerate(self.states)
            if state.job.loss == "dpo"
            for pair in (*state.data.met_in_training(), *state.data.held_out)
        ]
        if not needed:
            return References({})
        refresh_derived(self.states)
        sums = torch.zeros(len(needed), 2, device=self._base.device)
        own = self._ranks.share(range(len(needed)))
        with fast_passes(self._base, self._longest, packing=self._packing):
            rows, bank = self._rows([needed[number] for number in own], with_dropout=False, as_reference=True)
            sums[own] = self._losses.score(rows, bank).losses.view(-1, 2)
        sums = self._ranks.add_up(sums)
        return References({id(pair): sums[number] for number, (_, _, pair) in enumerate(needed)})

    def _pair_weights(self, micro_batch: Sequence[Numbered], sums: PairSums) -> dict[tuple[int, int], list[float]]:
        """By job and number in the step, the weights of a pair's answers; losses are added to `sums`."""
        pairs = [numbered for numbered in micro_batch if numbered[2].rejected is not None]
        if not pairs and not self._scores_together:
            return {}
        rows, bank = self._rows(pairs, with_dropout=True)
        return self._pairs_of(pairs, self._losses.score(rows, bank).losses, sums)

    def _pairs_of(
        self, batch: Sequence[Numbered], losses: Tensor, sums: PairSums
    ) -> dict[tuple[int, int], list[float]]:
        """The same from the summed losses of the batch's rows; those of no pairs are passed over."""
        weights, first = {}, 0
        for index, number, example in batch:
            own = losses[first : first + len(example.both)]
            first += len(example.both)
            if example.rejected is not None:
                beta = self.states[index].job.dpo_beta
                found = pair_losses(own.unsqueeze(0), self._references.of([example]), beta)
                sums.add(index, found)
                weights[index, number] = found.weights[0].tolist()
        return weights

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
        self,
        batch: Sequence[Numbered],
        *,
        with_dropout: bool,
        weights: Mapping[tuple[int, int], Sequence[float]] | None = None,  # of a pair's losses, by job and number
        as_reference: bool = False,  # of DPO
    ) -> tuple[list[TrainingRow], TrainingWeightProvider]:
        """Rows with the slots that they go through; with dropout every row has its own, which draws for it alone.

        A pair is two rows, one after the other. All fresh weights but LoReFT's change nothing, so that the reference
        of a job without `init_from` is the base model.
        """
        slots = [TrainingSlot(state.parameters.slot_weights) for state in self.states]
        frozen: list[list[FrozenSlot]] = []
        for state in self.states:
            members = range(len(slots), len(slots) + len(state.frozen.loras))
            frozen.append([FrozenSlot(n, lora.weight) for n, lora in zip(members, state.frozen.loras, strict=True)])
            slots += [TrainingSlot(lora.slot_weights) for lora in state.frozen.loras]
        rows = []
        for index, number, example in batch:
            state = self.states[index]
            dropout = state.dropout if with_dropout else 0.0
            gate = state.gate_before_user(number) if with_dropout else state.evaluated_gate_before_user
            is_moved = isinstance(state.parameters, TrainableReft) and not (as_reference and state.is_fresh)
            of_pair = (weights or {}).get((index, number))
            for place, one in enumerate(example.both):
                slot = index
                if dropout:
                    counters = (state.progress.step, number, place)[: 3 if place else 2]
                    draw = generator(state.job.seed, Purpose.DROPOUT, *counters, device=self._base.device)
                    slot = len(slots)
                    slots.append(TrainingSlot(state.parameters.slot_weights, dropout, draw))
                weight = example.weight if of_pair is None else of_pair[place]
                rows.append(TrainingRow(index, slot, one, bool(dropout), frozen[index], gate, weight, is_moved))
        return rows, TrainingWeightProvider(slots)


def reft_rows(states: Sequence[JobState]) -> ReftRows | None:
    """The interventions that jobs' rows go through; None: no job trains any."""
    jobs = {
        index: partial(state.parameters.operations, state.name)
        for index, state in enumerate(states)
        if isinstance(state.parameters, TrainableReft)
    }
    return ReftRows(jobs) if jobs else None


def _check_packing(base: PreTrainedModel, states: Sequence[JobState]) -> None:
    """Raise ConfigError where rows can't be packed."""
    for state in states:
        if state.parameters.residual is not None or state.frozen.chain or isinstance(state.parameters, TrainableReft):
            raise ConfigError(
                f"{state.job.label} goes through residuals, which take rows that aren't packed. Set packing=False."
            )
    check_packing(base)


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
