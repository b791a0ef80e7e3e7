"""Which replica is best for a request; Ray is not needed for that."""

from collections import Counter

from loraplex.server.replicas.affinity import ReplicaView, adapter_key, rank_replicas

NAMES = [f"adapter{i}" for i in range(1000)]


def view(id: str, held: set[str] | None = None, num_ongoing: int = 0) -> ReplicaView:
    return ReplicaView(id=id, held=frozenset(held or ()), num_ongoing=num_ongoing)


def home(name: str, *views: ReplicaView) -> str:
    return rank_replicas([name], views)[0][0]


def test_replica_that_holds_the_adapter_is_first():
    for name in NAMES[:20]:
        assert home(name, view("x", {name}), view("y")) == "x"
        assert home(name, view("x"), view("y", {name})) == "y"


def test_link_goes_where_all_its_adapters_are():
    views = [view("x", {"a"}), view("y", {"a", "b"}), view("z", {"b"})]
    assert rank_replicas(["a", "b"], views)[0] == ["y"]


def test_unheld_adapters_are_shared_out_evenly_and_stay():
    views = [view(id) for id in "xyz"]
    homes = {name: home(name, *views) for name in NAMES}
    assert all(250 < count < 420 for count in Counter(homes.values()).values())
    assert homes == {name: home(name, *reversed(views)) for name in NAMES}
    without_z = {name: home(name, *views[:2]) for name in NAMES}
    assert all(without_z[name] == homes[name] for name in NAMES if homes[name] != "z"), "only z's adapters move"


def test_crowded_replica_is_helped_out():
    assert home("a", view("x", {"a"}, num_ongoing=8), view("y")) == "x"
    assert home("a", view("x", {"a"}, num_ongoing=9), view("y")) == "y"
    assert home("a", view("x", {"a"}, num_ongoing=28), view("y", num_ongoing=10)) == "x"


def test_all_replicas_remain_possible_once_each():
    ranked = rank_replicas(["a"], [view("x", num_ongoing=99), view("y", {"a"}), view("z")])
    assert sorted(id for group in ranked for id in group) == ["x", "y", "z"]
    assert ranked[-1] == ["x"]


def test_base_model_goes_to_the_idlest():
    assert rank_replicas([], [view("x", num_ongoing=5), view("y")]) == [["x", "y"]], "one group: the router's choice"


def test_key_names_the_adapters_of_a_link():
    assert adapter_key("b:0.7+a:0.3", "tiny") == adapter_key("a+b", "tiny") == "a+b"
    assert [adapter_key(model, "tiny") for model in ("tiny", "a:", None, 3)] == ["", "", "", ""]
