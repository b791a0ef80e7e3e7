"""vLLM's CPU operators take a base row for one of the last slot; the plugin's spare slot keeps that one empty."""

import pytest

from tests.vllm.worlds import difference, engine, prompts


@pytest.mark.parametrize("options", [None, {}], ids=["without the plugin", "with it"])
def test_base_rows_beside_full_slots(world, options):
    choices = [None, "protein", "materials", None]
    paths = {} if options is not None else {name: str(folder) for name, folder in world.adapters.items()}
    rows = list(zip(choices, prompts(4, seed=2), strict=True))
    with engine(world, options, max_loras=2, max_cpu_loras=2) as llm:
        found = difference(llm, world, [row for row in rows if row[0] is None], 6, paths=paths)
        assert found.is_none, found  # alone, no row has a slot
        found = difference(llm, world, rows, 6, paths=paths)
    if options is None:
        assert found.num_wrong > 0, "vLLM is right by itself: the spare slot can go"
    else:
        assert found.is_none, found
