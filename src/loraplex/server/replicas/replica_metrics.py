"""One text for Prometheus from the texts of several replicas."""

from collections.abc import Iterator, Mapping

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


class Together(Collector):
    """What the front counts, and each replica's metrics with a label `replica`."""

    def __init__(self, front: Collector, texts: Mapping[str, str]) -> None:  # texts by replica
        self._front = front
        self._texts = texts

    def text(self) -> bytes:
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        yield from self._front.collect()
        families: dict[str, Metric] = {}
        for replica, text in sorted(self._texts.items()):
            for family in text_string_to_metric_families(text):
                known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                known.samples += [one._replace(labels={"replica": replica} | one.labels) for one in family.samples]
        yield from families.values()
