"""The Triton kernels on a real GPU: every spec, no host synchronisation, CUDA graphs, batch invariance, big strides."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rgtg_fast import ops
from rgtg_fast.ops import backend_of, tree_attention, use_backend
from tests.ops.specs import SPECS, call, in_double, row_of

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the Triton kernels are NOT run on a GPU"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    pytest.param(name, shape, dtype, id=f"{name}-{i}-{dtype}")
    for name, spec in SPECS.items()
    for i, shape in enumerate(spec.shapes)
    for dtype in DTYPES
    if shape.get("k", 0) <= 256
]
OF_ROWS = (
    "topk_logprobs",
    "tree_attention",
    "resample",
    "score_and_sample",
    "add_rms_norm",
    "rope_and_store",
)
EXACT = {"rtol": 0, "atol": 0, "equal_nan": True}


def moved(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


@pytest.fixture
def no_sync() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("name", "shape", "dtype"), CASES)
def test_equals_the_float64_reference(name, shape, dtype, compare):
    spec = SPECS[name]
    arguments = spec.make_inputs(shape, dtype)
    with use_backend("reference"):
        want = call(name, in_double(arguments))
    with use_backend("triton"):
        got = call(name, moved(arguments))
    for g, w in zip(got, want, strict=True):
        if w.is_floating_point():
            compare(g.cpu(), w, spec.tolerances[dtype])
        else:
            assert torch.equal(g.cpu(), w)


def test_triton_serves_and_the_reference_takes_what_it_does_not():
    for name in SPECS:
        assert backend_of(name, "cuda", torch.bfloat16) == "triton"
    logits = torch.randn(2, 1000, device="cuda")
    assert backend_of("topk_logprobs", "cuda", k=1000) == "reference"
    _, tokens, _ = ops.topk_logprobs(logits, 1000)
    assert torch.equal(tokens, logits.sort(dim=-1, descending=True, stable=True).indices)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECS)
def test_the_host_never_waits(name, dtype, request):
    arguments = moved(SPECS[name].make_inputs(SPECS[name].shapes[2], dtype))
    call(name, copy.deepcopy(arguments))  # compiles
    request.getfixturevalue("no_sync")
    call(name, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPECS)
def test_a_graph_replays_to_the_same_bits(name, dtype):
    arguments = moved(SPECS[name].make_inputs(SPECS[name].shapes[2], dtype))
    before = copy.deepcopy(arguments)
    want = tuple(x.clone() for x in call(name, copy.deepcopy(before)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(name, arguments)
    for _ in range(3):
        for key, x in before.items():
            if isinstance(x, torch.Tensor):
                arguments[key].copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, **EXACT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*OF_ROWS, "act_and_mul", "invariant_linear"])
def test_a_row_has_the_same_bits_in_any_batch(name, dtype):
    for shape in SPECS[name].shapes:
        if shape["B"] == 1 or shape.get("k", 0) > 256:
            continue
        arguments = moved(SPECS[name].make_inputs(shape, dtype))
        whole = call(name, arguments)
        for row in range(shape["B"]):
            for a, b in zip(call(name, row_of(arguments, row)), whole, strict=True):
                torch.testing.assert_close(a, b[row : row + 1], **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N", [64, 4096])
def test_a_product_has_the_same_bits_for_any_number_of_rows(dtype, N):
    """From one tile of 16 rows to several of 64, with a split sum and without."""
    x = torch.randn(1, 200, 4096, device="cuda", dtype=dtype)
    weight = torch.randn(N, 4096, device="cuda", dtype=dtype)
    whole = ops.invariant_linear(x, weight)
    for rows in (1, 10, 16, 17, 32, 40, 64, 65, 199):
        assert torch.equal(ops.invariant_linear(x[:, :rows], weight), whole[:, :rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("S", [1, 10, 40])
@pytest.mark.parametrize("window", [0, 600])
def test_the_cut_of_the_prefix_changes_no_bit(dtype, S, window, monkeypatch):
    kernel = SPECS["tree_attention"].kernel
    T = 2 * kernel.SPAN + 300
    shape = {"B": 2, "H": 8, "G": 2, "S": S, "T": T, "D": 128, "lengths": [T - 10, 700]}
    if window:
        shape |= {"window": window, "softcap": 3.0, "sinks": True}
    arguments = moved(SPECS["tree_attention"].make_inputs(shape, dtype))
    results = []
    for programs in (1, 1000):
        split = kernel.split_prefix(programs, 4 * S, T, kernel.least_leaf(16), 132)
        monkeypatch.setattr(kernel, "split_prefix", lambda *_, split=split: split)
        results.append(tree_attention(**arguments))
        monkeypatch.undo()
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 300, 2200])
def test_a_window_is_a_prefix_that_begins_later(dtype, window):
    shape = {"B": 1, "H": 8, "G": 2, "S": 10, "T": 5000, "D": 128, "lengths": [4900], "window": window}
    arguments = moved(SPECS["tree_attention"].make_inputs({**shape, "mask": "causal"}, dtype))
    later = {name: arguments[name][:, :, 4900 - window + 1 :] for name in ("k_cache", "v_cache")}
    later["lengths"] = torch.tensor([window - 1], device="cuda")
    assert torch.equal(tree_attention(**arguments), tree_attention(**{**arguments, **later}))


@pytest.mark.parametrize("S", [1, 10, 40])
def test_the_last_program_reads_what_all_have_written(S):
    """Thousands of launches over one buffer of tickets and partial sums that the allocator hands out again."""
    shape = {
        "B": 8,
        "H": 32,
        "G": 8,
        "S": S,
        "T": 1000,
        "D": 128,
        "lengths": [1000, 999, 640, 513, 512, 65, 64, 0],
    }
    arguments = moved(SPECS["tree_attention"].make_inputs(shape, torch.bfloat16))
    want = tree_attention(**arguments)
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(2000):
        differ += (tree_attention(**arguments) != want).any()
    assert differ.item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SPECS["partial_bt_loss"].shapes, ids=str)
def test_gradient_of_the_partial_bt_loss(shape, dtype, compare):
    arguments = SPECS["partial_bt_loss"].make_inputs(shape, dtype)
    with use_backend("reference"):
        _, want = torch.ops.rgtg_fast.partial_bt_loss(*in_double(arguments).values())
    with use_backend("triton"):
        _, got = torch.ops.rgtg_fast.partial_bt_loss(*moved(arguments).values())
        _, again = torch.ops.rgtg_fast.partial_bt_loss(*moved(arguments).values())
    assert torch.equal(got, again)
    compare(got.cpu(), want, SPECS["partial_bt_loss"].tolerances[dtype])
    rewards = arguments.pop("rewards").cuda().requires_grad_()
    ops.partial_bt_loss(rewards, **moved(arguments)).backward()
    assert rewards.grad is not None
    torch.testing.assert_close(rewards.grad, got.to(dtype), **EXACT)


def test_offsets_that_do_not_fit_give_nan_on_the_device():
    rewards = torch.zeros(5, device="cuda")
    for lengths in ((2, 2), (2, 9), (0, 5)):
        offsets = torch.tensor([0, *lengths]).cumsum(0).cuda()
        assert ops.partial_bt_loss(rewards, offsets, "repeat_last").isnan()


def test_offsets_pass_31_bits(compare):
    """Rows of the cache that lie further apart than 32 bits can count."""
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("less than 16 GiB free: offsets beyond 2^31 are NOT tested")
    small = SPECS["tree_attention"].make_inputs(
        {"B": 2, "H": 4, "G": 2, "S": 3, "T": 300, "D": 64}, torch.bfloat16
    )
    windowed = {**small, "window": 100}
    with use_backend("reference"):
        want, of_window = (call("tree_attention", in_double(case))[0] for case in (small, windowed))
    arguments = moved(small)
    far = (1 << 31) + 64
    for name in ("k_cache", "v_cache"):
        buffer = torch.empty(far + 2 * 300 * 64, dtype=torch.bfloat16, device="cuda")
        arguments[name] = buffer.as_strided((2, 2, 300, 64), (far, 300 * 64, 64, 1)).copy_(arguments[name])
    tolerance = SPECS["tree_attention"].tolerances[torch.bfloat16]
    compare(tree_attention(**arguments).cpu(), want, tolerance)
    compare(tree_attention(**{**arguments, "window": 100}).cpu(), of_window, tolerance)
    one, zero = (
        torch.ones(2, dtype=torch.int64, device="cuda"),
        torch.zeros(2, dtype=torch.int64, device="cuda"),
    )
    new = torch.randn(1, 2, 2, 3, 64, device="cuda").bfloat16()
    caches = [arguments[name][None] for name in ("k_cache", "v_cache")]
    ops.commit(new, new, *caches, lengths=zero, choice=one)
    for cache in caches:
        assert torch.equal(cache[:, :, :, 0], new[:, :, :, 1])
