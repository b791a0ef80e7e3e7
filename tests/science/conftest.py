"""The science examples need what examples/science/requirements.txt names: `make test-science` has it."""

import importlib.util

PARTS = ("rdkit", "lightgbm", "sklearn")
collect_ignore_glob = [] if all(importlib.util.find_spec(part) for part in PARTS) else ["test_*.py"]
