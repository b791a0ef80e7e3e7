"""`make test-sanitize` sees a read behind the end of a tensor, which ends the process; nothing else would tell."""

import os
import subprocess
import sys

import pytest

from loraplex.environment import switch
from tests.parts import NOT_THIS_MACHINE

PROGRAM = """
import torch
from loraplex.kernels.native import gated_lora_native, native_available
assert native_available()
width, rank = 64, {rank}
a, b = torch.ones(4, width), torch.ones(4, width)
table = torch.tensor([[[a.data_ptr(), b.data_ptr(), rank]]])
segments = torch.tensor([[0, 1, 0, 0]])
gated_lora_native(torch.zeros(1, width), torch.ones(1, width), table, torch.ones(1, 1), 0, segments, torch.ones(1))
print("ran to its end")
"""


@pytest.mark.skipif(not switch("LORAPLEX_SANITIZE", default=False), reason=f"{NOT_THIS_MACHINE}a run under sanitizers")
@pytest.mark.parametrize(("rank", "is_seen"), [(4, False), (5, True)])
def test_a_read_behind_the_end_is_seen(rank: int, is_seen: bool) -> None:
    command = [sys.executable, "-c", PROGRAM.format(rank=rank)]
    ended = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert ("AddressSanitizer: heap-buffer-overflow" in ended.stderr) is is_seen, ended.stderr[-3000:]
    assert ("ran to its end" in ended.stdout) is not is_seen
