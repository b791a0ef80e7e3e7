"""Every variant with a link in its weights, written and read again by transformers: equal to PEFT's row, or refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.errors import BaseModelError, LoraplexError
from loraplex.models.convert.merged_folder import MergeRecord, write_merged_folder
from loraplex.models.convert.merging import merge_into, read_members
from loraplex.routing.adapter_spec import parse_adapter_spec
from tests.architectures.checks import Case, assert_close, assert_far
from tests.architectures.oracle import LINK, forget_lengths, inputs_of
from tests.architectures.table import words_on_page
from tests.architectures.test_architectures import COMMON
from tests.architectures.variants import ARCHS, make_model

PARAMETERS = [pytest.param(name, marks=() if name in COMMON else pytest.mark.slow) for name in ARCHS]
READS_DT_PROJ = ("mamba", "falcon_mamba", "jamba")  # an adapter there has no effect before it is merged


@torch.no_grad()
def logits(model: PreTrainedModel, case: Case) -> Tensor:
    forget_lengths(model)
    return model(**inputs_of(case.kind == "seq2seq", case.rows[0][None], None)).logits[0]


@pytest.mark.parametrize("name", PARAMETERS)
def test_merged_link_is_the_served_link(name: str, tmp_path: Path) -> None:
    case, base, link = Case(name), make_model(name).requires_grad_(False), parse_adapter_spec(LINK)
    base.save_pretrained(tmp_path / "base")
    try:
        members = read_members(base, link, case.folders)
    except LoraplexError as error:
        if "target_parameters" in str(error):  # experts of transformers 5, which are no modules to merge into
            return
        assert words_on_page()[name]["forward"] == "refused", "what is served can be merged"
        return
    if name in READS_DT_PROJ:
        with pytest.raises(BaseModelError, match="dt_proj"):
            merge_into(base, members)
        return
    merge_into(base, members)
    write_merged_folder(
        base, str(tmp_path / "base"), tmp_path / "merged", MergeRecord(base=name, link=link, adapters={})
    )
    again, merged = (type(base).from_pretrained(tmp_path / folder).eval() for folder in ("base", "merged"))
    expected = case.oracle.logits(LINK, case.rows[0])
    assert_far(case.oracle.logits(None, case.rows[0]), expected, "the link")
    assert_close(logits(again, case), case.oracle.logits(None, case.rows[0]), "the base, written and read")
    assert_close(logits(merged, case), expected, "merged")
