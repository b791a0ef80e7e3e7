"""What is fuzzed: whole, small inputs of every kind, and how each is read."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from loraplex import Engine, EngineConfig, MultiLoraModel, Request, SamplingParams, XLoraConfig
from loraplex.adapters.inspect import describe
from loraplex.adapters.peft.reader import read_adapter
from loraplex.models.convert.conversion import convert_to_gguf, convert_to_peft
from loraplex.residual.format import write_residual
from loraplex.server.auth.keys import KeyFile
from loraplex.server.settings_sources import load_config
from loraplex.training import TrainConfig, train_adapters
from loraplex.training.adapters.job_state import JobState, run_fingerprint
from loraplex.training.adapters.setup import make_states
from loraplex.training.core.checkpoint import FILE, load_checkpoint
from loraplex.training.data.examples import make_examples
from loraplex.training.data.records import read_records
from loraplex.xlora.scalings.file import read_scalings, write_scalings
from loraplex.xlora.scalings.row_scalings import RowScalings
from tests.adapters.folders import as_pickle, shard
from tests.adapters.mlx_folders import write_mlx
from tests.fuzz.mutations import VALUES, mutate
from tests.residual.tiny_residuals import random_linked, random_vector
from tests.tiny_models import random_peft_adapter, tiny_model
from tests.training.tiny_jobs import records, tiny_job, tiny_tokenizer, write_records
from tests.xlora.mixtures import change_json

IDS = torch.arange(5, 12)[None]
TARGETS = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Target:
    """A kind of input: how a whole one is written into a folder, and how it is read."""

    name: str
    write: Callable[[Path], None]
    read: Callable[[Path, random.Random], None]  # raises what reading raises


class Bench:
    """One tiny model, and everything that reads files for it or beside it."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.model = MultiLoraModel(tiny_model("llama"))
        self.tokenizer = tiny_tokenizer()
        self.model.__dict__["tokenizer"] = self.tokenizer

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.model, EngineConfig(cache_bytes=2**20, max_waiting=4, max_running=4))

    def targets(self) -> list[Target]:
        peft = {"r": 4, "options": {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "exclude_modules": "lm_head"}}
        return [
            Target("adapter", lambda folder: self._adapter(folder, **peft), self._load_adapter),
            Target("dora", lambda folder: self._adapter(folder, options={"use_dora": True}), self._load_adapter),
            Target("sharded adapter", self._sharded, self._load_adapter),
            Target("pickled adapter", self._pickled, self._convert),
            Target("MLX adapter", lambda folder: _drop(write_mlx(folder, self.model.base)), self._convert),
            Target("GGUF adapter", self._gguf, self._convert),
            Target("mixture in PEFT's layout", lambda folder: self._mixture(folder, "peft"), self._load_mixture),
            Target("mixture in the original layout", lambda folder: self._mixture(folder, "xlora"), self._load_mixture),
            Target("published mixture", self._published, self._load_mixture),
            Target("linked residual", lambda folder: self._residual(folder, random_linked), self._load_residual),
            Target("steering vector", lambda folder: self._residual(folder, random_vector), self._load_residual),
            Target("checkpoint", self._checkpoint, self._load_checkpoint),
            Target("scalings", self._scalings, lambda folder, _: _drop(read_scalings(folder / "s.safetensors"))),
            Target("keys", self._keys, lambda folder, _: _drop(KeyFile(folder / "keys.json").records())),
            Target(
                "server's settings", self._settings, lambda folder, _: _drop(load_config(folder / "serve.json", {}))
            ),
            Target("training data", self._data, self._load_data),
            Target("request", Path.mkdir, self._request),
        ]

    def check_nothing_is_left(self) -> None:
        left = self.model.names()
        for name in left:
            self.model.unload(name)
        assert not left, f"{left} are loaded"

    # Adapters

    def _adapter(self, folder: Path, **options: Any) -> None:
        random_peft_adapter(self.model.base, folder, targets=TARGETS, **options)
        (folder / "README.md").unlink(missing_ok=True)

    def _load_adapter(self, folder: Path, draw: random.Random) -> None:
        if draw.random() < 0.1:
            describe(folder)
        self.model.load_adapter("fuzzed", folder)
        self._run_and_unload()

    def _sharded(self, folder: Path) -> None:
        self._adapter(folder)
        shard(folder)

    def _pickled(self, folder: Path) -> None:
        self._adapter(folder)
        as_pickle(folder)

    def _gguf(self, folder: Path) -> None:
        self._adapter(self.scratch / "for-gguf")
        folder.mkdir()
        convert_to_gguf(self.scratch / "for-gguf", folder / "a.gguf", base=self._base_folder)

    @cached_property
    def _base_folder(self) -> Path:
        """The model's config."""
        self.model.base.config.save_pretrained(self.scratch / "base")
        return self.scratch / "base"

    def _convert(self, folder: Path, draw: random.Random) -> None:
        output = self.scratch / "converted"
        try:
            convert_to_peft(folder, output, base=self._base_folder)
            self._load_adapter(output, draw)
        finally:
            shutil.rmtree(output, ignore_errors=True)

    def _published(self, folder: Path) -> None:
        """As the original package wrote it before 2024-02-23, with the ordering file of mistral.rs."""
        self._mixture(folder, "xlora")
        change_json(folder / "xlora_config.json", {}, drop=("adapters", "enable_relu_and_dropout", "use_bias"))
        layers = [f"model.layers.{block}.self_attn.{module}" for block in range(2) for module in TARGETS]
        ordering = {"order": ["a", "b"], "layers": {path: i for i, path in enumerate(layers)}}
        (folder / "ordering.json").write_text(json.dumps(ordering))

    def _mixture(self, folder: Path, layout: Any) -> None:
        for name in "ab":
            random_peft_adapter(self.model.base, self.scratch / f"expert-{name}", targets=TARGETS)
            self.model.load_adapter(name, read_adapter(self.scratch / f"expert-{name}"))
        config = XLoraConfig(xlora_depth=2, xlora_size=8, layerwise_scalings=True, top_k_lora=1)
        self.model.create_mixture("m", ["a", "b"], config)
        self.model.save_mixture("m", folder, layout=layout)
        for name in ("m", "a", "b"):
            self.model.unload(name)

    def _load_mixture(self, folder: Path, draw: random.Random) -> None:
        self.model.load_mixture("fuzzed", folder)
        self._run_and_unload()

    def _residual(self, folder: Path, make: Callable[[Any, int], Any]) -> None:
        write_residual(make(self.model.registry.linked.layers, 1), folder)

    def _load_residual(self, folder: Path, draw: random.Random) -> None:
        self.model.load_residual("fuzzed", folder)
        self._run_and_unload()

    def _run_and_unload(self) -> None:
        """What was loaded can be run, and leaves the base model's rows as they are."""
        try:
            with torch.no_grad():
                logits = self.model(IDS.expand(2, -1), adapters=["fuzzed", None]).logits
            assert bool(logits[1].isfinite().all()), "a row of the base model is not finite"
        finally:
            self.model.unload("fuzzed")

    # Training

    @cached_property
    def _states(self) -> list[JobState]:
        jobs = [tiny_job(self.scratch, name, max_steps=2, patience=2, eval_every=1) for name in "ab"]
        return make_states(jobs, self.model.base, self.model.adaptable, self.tokenizer)

    def _checkpoint(self, folder: Path) -> None:
        jobs = [tiny_job(self.scratch, name, max_steps=2, patience=2, eval_every=1) for name in "ab"]
        config = TrainConfig(output=folder, plots=False, progress=False)
        train_adapters(self.model, self.tokenizer, jobs=jobs, config=config)
        for path in folder.iterdir():
            if path.is_dir():
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()
            elif path.name != FILE:
                path.unlink()

    def _load_checkpoint(self, folder: Path, draw: random.Random) -> None:
        identity = run_fingerprint(self._states, self.model.base)
        load_checkpoint(folder, self._states, identity)

    def _data(self, folder: Path) -> None:
        folder.mkdir()
        lines = [*records("messages", 3), *records("prompt", 3), *records("text", 3)]
        write_records(folder / "data.jsonl", lines)

    def _load_data(self, folder: Path, draw: random.Random) -> None:
        make_examples(read_records(folder / "data.jsonl"), self.tokenizer, 64)

    # Others

    def _scalings(self, folder: Path) -> None:
        row = RowScalings(
            mixture="m", experts=("a", "b"), layers=("l.q",), token_ids=(1, 2, 3), values=torch.rand(3, 1, 2)
        )
        write_scalings([row, row], folder / "s.safetensors")

    def _keys(self, folder: Path) -> None:
        KeyFile(folder / "keys.json").create(note="n", requests_per_minute=3, use=("a*",))

    def _settings(self, folder: Path) -> None:
        folder.mkdir()
        content = '{"model": {"model": "smollm2-135m", "dtype": "float32"}, "network": {"port": 8000, "drain_s": 3.5}, '
        content += '"limits": {"max_choices": 4}, "access": {"adapter_roots": ["/tmp"]}}'
        (folder / "serve.json").write_text(content)

    def _request(self, folder: Path, draw: random.Random) -> None:
        names = [field.name for field in fields(SamplingParams)]
        options = {draw.choice(names): draw.choice(VALUES) for _ in range(draw.choice([0, 1, 1, 2]))}
        sampling = SamplingParams(**{"max_tokens": 2} | options)
        asked: dict[str, Any] = {}
        if draw.random() < 0.5:
            kinds = ["adapters", "priority", "cache_salt", "return_scalings", "scalings_budget_bytes"]
            asked[draw.choice(kinds)] = draw.choice(VALUES)
        prompt = draw.choice(["abc", [5, 6, 7], [{"role": "user", "content": "hi"}]])
        if draw.random() < 0.2:
            prompt = draw.choice(VALUES)
        request_id = self.engine.add_request(Request(prompt, sampling=sampling, **asked))
        try:
            for _ in range(3):
                self.engine.step()
        finally:
            self.engine.cancel(request_id)
            self.engine.step()


def _drop(value: object) -> None:
    """Read only to see what reading raises."""


def damage(draw: random.Random, folder: Path) -> None:
    """Damage one or two files of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    for file in draw.sample(files, min(len(files), draw.choice([1, 1, 1, 2]))):
        mutate(draw, file)
