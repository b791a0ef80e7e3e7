"""The Triton kernels compiled for an H100, which needs none: no error, wide loads, products on tensor cores."""

import re

import pytest

from tests.parts import skip_here

pytestmark = pytest.mark.needs("triton")
_ADDRESSES = {"table": "*i64", "scalings": "*fp32", "gates": "*fp32", "hidden": "*fp32", "grads": "*fp32"}
_ADDRESSES |= {"settings": "*fp32", "parameters": "*i64", "told": "*i64", "kept": "*fp32"}
_LISTS = {"entries": "*i32", "tiles": "*i32", "experts": "*i32", "segments": "*i64", "offsets": "*i64"}
_BLOCKS = {"BLOCK_TOKENS": 16, "BLOCK_RANK": 16, "ALIGNED": True, "NUM_PROJECTIONS": 3}
# As triton sees arguments whose values are multiples of 16.
_DIVISIBLE = ("num_in", "part_size", "width", "num_features")


def ptx_of(kernel, dtype, constants, tmp_path, monkeypatch) -> str:
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = kernel.fn if hasattr(kernel, "configs") else kernel  # without its tuner
    given = {name: value for name, value in constants.items() if name in function.arg_names}
    types = {**_ADDRESSES, **_LISTS, **dict.fromkeys(("x", "y0", "y1", "y2", "like"), f"*{dtype}")}
    signature = {name: "constexpr" if name in given else types.get(name, "i32") for name in function.arg_names}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if signature[name].startswith("*") or name in _DIVISIBLE
    }
    places = {(function.arg_names.index(name),): value for name, value in given.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=places, attrs=divisible)
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 2}).asm["ptx"]


@pytest.fixture(scope="module", autouse=True)
def not_interpreted():
    from loraplex.kernels.triton.available import is_interpreted

    if is_interpreted():
        skip_here("a compiler of Triton's kernels, with TRITON_INTERPRET=1")


def test_shrink_reads_sixteen_bytes_at_once(tmp_path, monkeypatch):
    from loraplex.kernels.triton.shrink import shrink_kernel

    constants = {**_BLOCKS, "FACTOR": 0, "GATES": 1, "BLOCK_IN": 128}
    ptx = ptx_of(shrink_kernel, "bf16", constants, tmp_path, monkeypatch)
    assert "mma" in ptx
    assert re.search(r"cp\.async\.cg\.shared\.global|ld\.global[.\w:]*\.v4\.b32", ptx)
    assert not re.search(r"ld\.global[.\w:]*\.b16", ptx)  # one value at a time


@pytest.mark.parametrize(("summed", "num_parts"), [(False, 8), (True, 1)])
def test_expand_reads_and_writes_sixteen_bytes_at_once(summed, num_parts, tmp_path, monkeypatch):
    from loraplex.kernels.triton.expand import expand_kernel

    constants = {**_BLOCKS, "FACTOR": 1, "SUMMED": summed, "NUM_PARTS": num_parts, "BLOCK_OUT": 128}
    ptx = ptx_of(expand_kernel, "bf16", constants, tmp_path, monkeypatch)
    assert "mma" in ptx
    assert re.search(r"st\.global[.\w:]*\.v4\.b32", ptx)
    assert not re.search(r"(ld|st)\.global[.\w:]*\.b16", ptx)


def test_factors_at_odd_addresses_are_read_one_by_one(tmp_path, monkeypatch):
    """What is not aligned must not be read in sixteen bytes: the promise comes from the caller alone."""
    from loraplex.kernels.triton.expand import expand_kernel

    constants = {**_BLOCKS, "ALIGNED": False, "FACTOR": 1, "SUMMED": False, "NUM_PARTS": 1, "BLOCK_OUT": 128}
    assert re.search(r"ld\.global[.\w:]*\.b16", ptx_of(expand_kernel, "bf16", constants, tmp_path, monkeypatch))


def test_outer_compiles_for_float32_without_rounding_to_tf32(tmp_path, monkeypatch):
    from loraplex.kernels.triton.outer import outer_kernel

    constants = {"BLOCK_TOKENS": 32, "BLOCK_RANK": 16, "BLOCK_FEATURES": 128}
    ptx = ptx_of(outer_kernel, "fp32", constants, tmp_path, monkeypatch)
    assert "tf32" not in ptx
    assert "fma.rn.f32" in ptx


def test_route_compiles_with_a_barrier_between_its_reads_and_writes(tmp_path, monkeypatch):
    from loraplex.kernels.triton.route import route_kernel

    constants = {**_BLOCKS, "KEEPS": True, "NUM_PARTS": 8, "BLOCK_EXPERTS": 4, "BLOCK_IN": 128}
    ptx = ptx_of(route_kernel, "bf16", constants, tmp_path, monkeypatch)
    assert "tf32" not in ptx
    assert re.search(r"bar(rier)?\.sync", ptx)
    assert "st.global" in ptx
