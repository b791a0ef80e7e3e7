"""Random adapters, from the package: quicker than PEFT, whose import would also cost memory."""

from loraplex.bench.random_adapters import ALL_TARGETS, random_adapter, write_random_folders

__all__ = ["ALL_TARGETS", "random_adapter", "write_random_folders"]
