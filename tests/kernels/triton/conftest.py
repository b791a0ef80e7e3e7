"""These run in a process of their own, with triton's interpreter: see tests/kernels/test_triton.py."""

from loraplex.kernels.triton.available import is_interpreted

collect_ignore_glob = [] if is_interpreted() else ["test_*.py"]
