"""The model of each replica in tests: many adapters, of which host memory holds some. No test itself."""

import time
from pathlib import Path

from loraplex import MultiLoraModel, StoreConfig
from loraplex.bench.random_adapters import write_random_folders
from loraplex.engine.engine import Engine
from loraplex.server.settings import ServeConfig
from tests.server.tiny_server import character_tokenizer
from tests.tiny_models import tiny_model

NUM_ADAPTERS, NUM_HELD = 200, 120
_STEP_S = 0.01  # requests must be running when a replica is killed


def write_folders(root: Path) -> None:
    model = MultiLoraModel(tiny_model("llama"))
    write_random_folders(model.adaptable.shapes, root, [2] * NUM_ADAPTERS, model.dtype)


def load(config: ServeConfig) -> MultiLoraModel:
    """What `config.model.model` names is the folder of adapters here."""
    step = Engine.step

    def slow_step(engine: Engine):
        time.sleep(_STEP_S)
        return step(engine)

    Engine.step = slow_step  # this process is one replica
    folders = sorted(Path(config.model.model).iterdir())
    probe = MultiLoraModel(tiny_model("llama"))
    probe.load_adapter("probe", folders[0])
    each = probe.adapters()[0].num_bytes
    model = MultiLoraModel(tiny_model("llama"), store=StoreConfig(host_bytes=NUM_HELD * each, num_slots=16))
    model.__dict__["tokenizer"] = character_tokenizer()
    for folder in folders:
        model.load_adapter(folder.name, folder)
    return model
