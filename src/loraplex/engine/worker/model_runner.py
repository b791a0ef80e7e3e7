"""Run packed batches through the base model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex.adapters.weights import ModuleKind
from loraplex.engine.config import EngineConfig
from loraplex.engine.kv.block_pool import BlockPool, BlockTable
from loraplex.engine.kv.kv_cache import KeyValueCache
from loraplex.engine.kv.residual_cache import ResidualCache
from loraplex.engine.sampling.sampler import largest
from loraplex.engine.sched.chunk import ScheduledChunk
from loraplex.engine.worker.attention_hooks import UNKNOWN_LENGTH, AttentionHooks
from loraplex.engine.worker.cuda_graphs import DecodeGraphs, Recorder
from loraplex.engine.worker.fusion.cpu_fusion import CpuFusion, Trial, fuse
from loraplex.engine.worker.images import ImageEncoder
from loraplex.engine.worker.input_batch import InputBatch, forward_context
from loraplex.engine.worker.interventions import InterventionRows
from loraplex.engine.worker.mixture_gates import MixtureGates
from loraplex.engine.worker.residuals import AttentionRows, ForwardContext
from loraplex.engine.worker.routing import PackedRouting
from loraplex.engine.worker.state_mixers import join_mixers, leave_mixers
from loraplex.engine.worker.state_pool import PassStates, make_states, without_rollback
from loraplex.errors import AdapterError, ConfigError
from loraplex.layers.base.output_layer import choosing_tokens
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.residual.intervention_pass import use_interventions
from loraplex.residual.scope import use_attention
from loraplex.routing.routing import use_routing
from loraplex.routing.weight_provider import SlotWeightProvider


@dataclass(frozen=True, kw_only=True)
class ModelRunnerOutput:
    """What a pass gave for one chunk."""

    chunk: ScheduledChunk
    logits: Tensor | None  # [vocab], of its last token
    all_logits: Tensor | None  # [count, vocab], where they are wanted
    best: int | None  # the largest of them
    hidden: Tensor | None  # [count, hidden], of a scaling pass, and where it is wanted
    scalings: list[Tensor]  # of each mixture [count, lora_layers, experts], where they are wanted
    error: AdapterError | None  # of a function in its link; the rest is then worth nothing


class ModelRunner:
    """The base model, joined to packed passes, and the memory for keys and values."""

    def __init__(self, model: MultiLoraModel, config: EngineConfig) -> None:
        self.model = model
        longest = self._model_length(config)
        self._hooks = AttentionHooks(model.base, longest)
        self.shapes, self.lengths = self._hooks.shapes, self._hooks.lengths
        self._bank = SlotWeightProvider(model.store.slots)
        try:
            self._states = make_states(model.base, self.shapes, config)
        except BaseException:
            self._hooks.detach()
            raise
        self.config = config if self._states is None else without_rollback(config)  # as this model can be run
        device = model.base.device
        token_bytes = sum(shape.token_bytes for shape in self.shapes.values())
        state_bytes = 0 if self._states is None else self._states.num_bytes
        num_blocks = (config.cache_bytes - state_bytes) // (token_bytes * config.block_tokens)
        if num_blocks < 1:
            self._hooks.detach()
            raise ConfigError(
                f"cache_bytes is {config.cache_bytes}, but {config.block_tokens} tokens of this model take "
                f"{token_bytes * config.block_tokens} bytes. Raise cache_bytes."
            )
        self.max_length = min(longest, num_blocks * config.block_tokens)
        self.pool = BlockPool(num_blocks, config.block_tokens)
        row_blocks = -(-(self.max_length + 1) // config.block_tokens)
        num_rows = 2 * config.max_running if self._states is None else self._states.num_rows
        self.table = BlockTable(num_rows, row_blocks, device, grows=self._states is None)
        self.cache = KeyValueCache(self.shapes, num_blocks, config.block_tokens, device)
        self.attention = AttentionRows(model.registry.linked, ResidualCache(num_blocks, config.block_tokens, device))
        self.interventions = InterventionRows(model.registry.linked)
        self._fused: CpuFusion | None = None
        self.graphs: DecodeGraphs | None = None
        self._images = ImageEncoder(model.base, model.adaptable, self._bank)
        if self._states is not None:
            join_mixers(self._states.shapes)

    def use_graphs(self, record: Recorder) -> None:
        """Run passes of single tokens as recorded steps from now on, where they can be."""
        adaptable = self.model.adaptable

        def indices(kind: ModuleKind) -> frozenset[int]:
            return frozenset(adaptable.module_index[path] for path, s in adaptable.shapes.items() if s.kind == kind)

        self.graphs = DecodeGraphs(
            self.model.base,
            self.cache,
            self._bank,
            row_blocks=self.table.row_blocks,
            embeddings=indices("embedding"),
            experts=indices("moe experts"),
            fast_decode=self.model.decodes_fast,
            record=record,
        )

    def forget_lengths(self) -> None:
        """Let positions that depend on a sequence's length be those of a fresh model in its next pass of its own."""
        self._hooks.forget_lengths()

    def close(self) -> None:
        if self._fused is not None:
            self._fused.release()
            self._fused = None
        if self._states is not None:
            leave_mixers(self._states.shapes)
        self._images.leave()
        self._hooks.detach()

    @torch.inference_mode()
    def fuse(self, trial: Trial) -> None:
        """Let compiled operators run modules of the base model where that changes nothing, as `trial` shows."""
        adaptable = self.model.adaptable
        index: dict[nn.Module | tuple[nn.Module, str], int] = {}
        for path, module in adaptable.modules.items():
            key = (module, path.rpartition(".")[2]) if adaptable.shapes[path].is_parameter else module
            index[key] = adaptable.module_index[path]
        self._fused = fuse(self.model.base, self.cache, index, trial)

    def limit_chunk_keys(self, limit: int) -> None:
        """Up to how many keys the tokens of prompts may see in passes of compiled layers, where there are no tiles."""
        if self._fused is not None:
            self._fused.limit_chunk_keys(limit)

    def attends(self, module: nn.Module) -> bool:
        """Whether it is a module of which keys and values are kept."""
        return module in self.shapes

    @property
    def max_passes(self) -> int | None:
        """How many passes can be under way at once; None: as many as there are blocks for."""
        return None if self._states is None else self._states.num_rows

    @property
    def vocab_size(self) -> int:
        return int(self.model.base.get_input_embeddings().num_embeddings)

    def run(self, chunks: Sequence[ScheduledChunk]) -> list[ModelRunnerOutput]:
        """One forward pass; keys, values and the sequences' progress are kept.

        Chunks whose adapters change weights inside of layers get a pass of their own: the layers run one by one there,
        and other rows' bits must not tell whether such rows are beside them.
        """
        apart = [chunk for chunk in chunks if self._changes_layers(chunk)]
        if not apart or len(apart) == len(chunks):
            return self._run(chunks)
        return self._run([chunk for chunk in chunks if chunk not in apart]) + self._run(apart)

    def _changes_layers(self, chunk: ScheduledChunk) -> bool:
        tables = self.model.adaptable.tables
        return any(path not in tables for route in chunk.kv.routes for path in self._bank.changes(route.slot))

    @torch.inference_mode()
    def _run(self, chunks: Sequence[ScheduledChunk]) -> list[ModelRunnerOutput]:
        batch = InputBatch(chunks, self.cache, self.table)
        scope = self.attention.scope(batch)
        logits = self.forward(batch, scope)
        failed = {} if scope is None else scope.finish()
        self.interventions.check_ran()
        best_tokens = largest(logits).tolist()
        results, place = [], 0
        own_sizes = self._own_sizes(batch.chunks)
        for i, chunk in enumerate(batch.chunks):
            chunk.kv.num_computed = chunk.stop
            own = best = None
            stop = place + chunk.num_logits
            chunk_logits = logits[place:stop] if own_sizes is None else logits[place:stop, : own_sizes[i]]
            if chunk.wants_logits:
                own = chunk_logits[-1]
                is_whole = len(own) == logits.shape[-1]
                best = best_tokens[stop - 1] if is_whole else int(own.argmax())
            all_logits = chunk_logits if chunk.wants_all_logits else None
            place = stop
            hidden = None
            if chunk.wants_hidden:
                assert batch.last_hidden is not None, "the decoder's hidden states were not kept"
                hidden = batch.last_hidden[batch.offsets[i] : batch.offsets[i] + chunk.count]
            told = batch.scalings.get(i, [])
            error = failed.get(i)
            results.append(
                ModelRunnerOutput(
                    chunk=chunk,
                    logits=own,
                    all_logits=all_logits,
                    best=best,
                    hidden=hidden,
                    scalings=told,
                    error=error,
                )
            )
        return results

    def _own_sizes(self, chunks: Sequence[ScheduledChunk]) -> list[int] | None:
        """How many tokens have logits in each chunk's row; None: in all of them those that the base model has."""
        by_chunk = [
            next((n for route in chunk.kv.routes if (n := self._bank.num_tokens(route.slot)) is not None), None)
            for chunk in chunks
        ]
        if all(own is None for own in by_chunk):
            return None
        base = self.model.registry.num_tokens
        return [base if own is None else own for own in by_chunk]

    def forward(
        self, batch: InputBatch, scope: ForwardContext | None = None, base: PreTrainedModel | None = None
    ) -> Tensor:  # [logits, vocab]
        """The logits of the chunks that want some, in the batch's order; `base`: of a part of the model's layers."""
        batch.attention = scope
        self._images.embed(batch)
        interventions = self.interventions.of(batch)
        batch.states = None if self._states is None else PassStates(self._states, batch)
        gates = MixtureGates(batch)  # the scaling heads, on what the scaling passes of these tokens left
        routing = PackedRouting(
            batch,
            gates,
            self._bank,
            fast_decode=self.model.decodes_fast,
            batch_invariant=self.config.batch_invariant,
        )
        is_plain = scope is None and interventions is None and batch.position_ids.ndim == 1
        if self.graphs is not None and is_plain:
            with choosing_tokens():
                recorded = self.graphs.run(batch, routing.plan)
            if recorded is not None:
                logits, batch.last_hidden = recorded
                return logits if batch.selected is None else logits[batch.selected]
        with (
            use_routing(routing),
            forward_context(batch),
            use_attention(scope),
            use_interventions(interventions),
            choosing_tokens(),
        ):
            output = (base or self.model.base)(
                input_ids=batch.token_ids.unsqueeze(0), position_ids=batch.position_ids.unsqueeze(-2), use_cache=False
            )
        routing.keep_gates()
        batch.attention = None  # which knows the batch: what they hold goes now, not when cycles are collected
        if batch.states is not None:
            batch.states.keep()
        return output.logits[0]

    def _model_length(self, config: EngineConfig) -> int:
        if config.max_length is not None:
            return config.max_length
        text_config = self.model.base.config.get_text_config(decoder=True)
        return int(getattr(text_config, "max_position_embeddings", None) or UNKNOWN_LENGTH)
