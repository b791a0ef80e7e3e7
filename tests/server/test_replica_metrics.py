"""The front's text for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from loraplex.server.replicas.replica_metrics import Together


def text_of_a_replica(tokens: int) -> str:
    registry = CollectorRegistry()
    Counter("new_tokens", "New", registry=registry).inc(tokens)
    Gauge("held", "Held", ["tier"], registry=registry).labels("slot").set(tokens)
    Histogram("seconds", "Latency", ["adapter"], buckets=(1, 2), registry=registry).labels("a").observe(1.5)
    return generate_latest(registry).decode()


def test_replicas_differ_by_a_label_and_share_their_families():
    front = CollectorRegistry()
    Counter("front", "Of the front", registry=front).inc(7)
    text = Together(front, {"r1": text_of_a_replica(3), "r2": text_of_a_replica(5)}).text().decode()
    for line in (
        "front_total 7.0",
        'new_tokens_total{replica="r1"} 3.0',
        'new_tokens_total{replica="r2"} 5.0',
        'held{replica="r2",tier="slot"} 5.0',
        'seconds_bucket{adapter="a",le="2.0",replica="r1"} 1.0',
    ):
        assert line in text.splitlines()
    assert text.count("# TYPE new_tokens_total counter") == 1
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)


def test_without_replicas_the_front_speaks_for_itself():
    front = CollectorRegistry()
    Counter("front", "Of the front", registry=front)
    assert Together(front, {}).text() == generate_latest(front)
