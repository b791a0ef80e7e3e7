"""Requests whose adapters are still on their way to the device: the others' steps go on."""

import time

from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from tests.adapters.test_transfers import ThreadLane
from tests.engine.engines import answer, assert_same, make_model, prompts, write_adapters


def test_others_go_on_until_the_weights_have_arrived(tmp_path):
    model = make_model("llama", write_adapters("llama", tmp_path), mixtures=False)
    base, adapted, linked = prompts((6,), (None, "0", "0:0.5+2:0.7"))
    expected = [answer(model, prompted, 5) for prompted in (base, adapted, linked)]
    for name in ("0", "2"):
        model.load_adapter(name, tmp_path / name, replace=True)  # into slots again, through the lane
    lane = ThreadLane()
    model.store.slots._lane = lane
    with Engine(model, EngineConfig(cache_bytes=2**22)) as engine:
        ids = [engine.add_request(prompted.request(max_tokens=5)) for prompted in (base, adapted, linked)]
        results = {}
        deadline = time.monotonic() + 60
        while len(results) < 3:
            assert time.monotonic() < deadline, "the requests did not end"
            assert lane.may_copy.is_set() or {delta.request_id for delta in engine.step()} <= {ids[0]}
            if lane.may_copy.is_set():
                engine.step()
            results |= {i: result for i in ids if (result := engine.pop_result(i)) is not None}
            if ids[0] in results:  # without those that wait
                lane.may_copy.set()
    for prompted, request_id, tokens in zip((base, adapted, linked), ids, expected, strict=True):
        assert_same(model, prompted, results[request_id], tokens)
