"""The Triton kernels against the reference, in Triton's interpreter."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import io
import math
from importlib.metadata import version
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch

from rgtg_fast import Guidance, RGTGError
from rgtg_fast.ops import (
    backend_of,
    commit,
    partial_bt_loss,
    resample,
    topk_logprobs,
    tree_attention,
    use_backend,
)
from rgtg_fast.ops._triton import _tickets, tickets
from tests.covering import daily, each
from tests.engine.support import prompts_of
from tests.engine.test_ahead import as_numbers, make_decoder
from tests.ops.interpreted import interpreted
from tests.ops.specs import SPECS, Tolerance, call, in_double
from tests.ops.support import cases_of, compare, shape_and_dtype


def _missing() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: the Triton kernels are NOT tested (pip install triton)"
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton <= (3, 6) and numpy >= (2, 4):
        return (
            "Triton 3.6's interpreter fails with numpy 2.4: the kernels are NOT interpreted; use numpy < 2.4"
        )
    return ""


pytestmark = pytest.mark.triton
if _missing():
    pytest.skip(_missing(), allow_module_level=True)
SPAN = SPECS["tree_attention"].kernel.SPAN
INF, NAN = math.inf, math.nan

# Small enough for an interpreter that walks through every program one by one; the same edges as the specs' own.
SHAPES = {
    "topk_logprobs": (
        *(
            shape
            for shape in SPECS["topk_logprobs"].shapes
            if shape["V"] * shape["B"] < 50000 and shape["k"] <= 256
        ),
        {"B": 2, "V": 6151, "k": 40, "guided": True},
        {"B": 1, "V": 128256, "k": 256},
    ),
    "tree_attention": tuple(
        shape
        for shape in SPECS["tree_attention"].shapes
        if shape["B"] * shape["H"] * shape["S"] * shape["T"] < 200_000 or shape["T"] < 256
    ),
    "resample": tuple(shape for shape in SPECS["resample"].shapes if shape["B"] <= 8),
    "commit": SPECS["commit"].shapes,
    "score_and_sample": SPECS["score_and_sample"].shapes,
    "finish_step": SPECS["finish_step"].shapes,
    "partial_bt_loss": tuple(shape for shape in SPECS["partial_bt_loss"].shapes if shape["N"] <= 8),
}
CASES = daily(cases_of(SHAPES), shape_and_dtype)


@pytest.mark.parametrize(("name", "shape", "dtype"), CASES)
@interpreted
def test_equals_the_float64_reference(name, shape, dtype):
    """Outputs and scratch start as NaN, so that nothing is left unwritten and nothing unwritten is read."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> torch.Tensor:
        x = empty(*size, **options)
        return x.fill_(NAN if x.is_floating_point() else -(1 << 30))

    spec = SPECS[name]
    arguments = spec.make_inputs(shape, dtype)
    with use_backend("reference"):
        want = call(name, in_double(arguments))
    with use_backend("triton"), mock.patch.object(torch, "empty", poisoned):
        got = call(name, arguments)
    for g, w in zip(got, want, strict=True):
        if w.is_floating_point():
            compare(g, w, spec.tolerances[dtype])
        else:
            assert torch.equal(g, w)


@pytest.mark.parametrize("name", SPECS)
@interpreted
@use_backend("triton")
def test_opcheck(name):
    arguments = SPECS[name].make_inputs(SPECS[name].shapes[1], torch.float32)
    torch.library.opcheck(getattr(torch.ops.rgtg_fast, name).default, tuple(arguments.values()))


@pytest.mark.parametrize("name", ["topk_logprobs", "tree_attention", "resample"])
@interpreted
@use_backend("triton")
def test_a_row_has_the_same_bits_in_any_batch(name):
    shape = next(shape for shape in SHAPES[name] if shape["B"] > 1)
    arguments = SPECS[name].make_inputs(shape, torch.float32)
    whole = call(name, arguments)
    for row in range(shape["B"]):
        alone = {key: x[row : row + 1] if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
        for a, b in zip(call(name, alone), whole, strict=True):
            torch.testing.assert_close(a, b[row : row + 1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", SPECS)
@interpreted
@use_backend("triton")
def test_strided_views_give_the_same(name):
    """Every tensor is a view with gaps in each dimension but the last."""
    arguments = SPECS[name].make_inputs(SPECS[name].shapes[1], torch.float32)

    def spread(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.ndim < 2 or not x.is_floating_point():
            return x
        room = torch.full([2 * n for n in x.shape[:-1]] + [x.shape[-1] + 3], NAN)
        view = room[tuple(slice(None, None, 2) for _ in x.shape[:-1])][..., : x.shape[-1]]
        return view.copy_(x)

    views = {key: spread(copy.deepcopy(x)) for key, x in arguments.items()}
    for a, b in zip(call(name, arguments), call(name, views), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# --- topk_logprobs


@interpreted
@use_backend("triton")
def test_ties_go_to_the_lowest_token():
    logits = torch.zeros(1, 9000)
    logits[0, [100, 8999, 4096, 2047, 2048]] = 1.0
    logits[0, ::2] *= -1.0  # −0 is 0
    logits[0, [100, 4096, 2048]] = 1.0
    _, tokens, entropy = topk_logprobs(logits, k=9)
    assert tokens[0].tolist() == [100, 2047, 2048, 4096, 8999, 0, 1, 2, 3]
    p = logits.double().softmax(-1)
    assert entropy.item() == pytest.approx(-(p * p.log()).sum().item(), rel=2e-5)


@pytest.mark.parametrize("V", [1, 7, 2047, 2048, 2049, 5000])
@interpreted
@use_backend("triton")
def test_all_excluded_but_one(V):
    logits = torch.full((2, V), -INF)
    logits[0, V - 1], logits[1, 0] = -1e30, 5.0
    logprobs, tokens, entropy = topk_logprobs(logits, k=min(3, V))
    assert tokens[:, 0].tolist() == [V - 1, 0]
    assert logprobs[:, 0].tolist() == [0.0, 0.0]
    assert entropy.tolist() == [0.0, 0.0]
    assert tokens[0, 1:].tolist() == list(range(min(3, V) - 1))
    assert (logprobs[:, 1:] == -INF).all()


@interpreted
@use_backend("triton")
def test_nan_is_seen_and_zero_beta_ignores_guidance():
    logits = torch.zeros(3, 2100)
    logits[0, 2099] = NAN
    guidance = torch.zeros(3, 2100)
    guidance[1, 7], guidance[2] = NAN, NAN
    logprobs, tokens, entropy = topk_logprobs(logits, 2, guidance, torch.tensor([1.0, 1.0, 0.0]))
    assert tokens.tolist() == [[2099, 0], [7, 0], [0, 1]]
    assert logprobs[0].isnan().all()
    assert entropy[0].isnan()
    assert logprobs[1:].isfinite().all()


V = 5000
WAYS = {
    "all equal": lambda random: torch.full((V,), 1.5),
    "all excluded but fewer than k": lambda random: torch.full((V,), -INF).index_fill(
        0, torch.tensor([9, 4000]), 1.0
    ),
    "ascending": lambda random: torch.arange(V) / 16,
    "descending": lambda random: -torch.arange(V) / 16,
    "ties at the threshold in every segment": lambda random: torch.randint(
        0, 3, (V,), generator=random
    ).float(),
    "the large ones in one group": lambda random: torch.cat(
        [-torch.rand(2080, generator=random), torch.arange(32) % 7.0, -torch.rand(V - 2112, generator=random)]
    ),
    "the large ones in one segment": lambda random: torch.cat(
        [
            -torch.rand(1024, generator=random),
            torch.rand(1024, generator=random),
            torch.full((V - 2048,), -3.0),
        ]
    ),
    "neighbouring numbers": lambda random: (
        torch.randint(0, 40, (V,), generator=random, dtype=torch.int32) + 0x41000000
    ).view(torch.float32),
    "both signs and both zeros": lambda random: torch.tensor([-1e-38, -0.0, 0.0, 1e-38])[
        torch.randint(0, 4, (V,), generator=random)
    ],
    "the largest range": lambda random: (
        torch.randn(V, generator=random).sign() * 2.0 ** torch.linspace(-149, 127, V)
    ),
    "NaN and infinities": lambda random: torch.tensor([NAN, -NAN, INF, -INF, 0.0])[
        torch.randint(0, 5, (V,), generator=random)
    ],
}


@pytest.mark.parametrize(("way", "k"), daily(product(WAYS, [1, 7, 16, 17, 200, 256]), each))
@interpreted
@use_backend("triton")
def test_the_search_ends_at_the_right_tokens_whatever_the_logits(way, k):
    random = torch.Generator().manual_seed(k)
    row = WAYS[way](random).float()
    # A guided row too: in float32, 32 bits of the scores count.
    for dtype, guided in ((torch.float32, True), (torch.bfloat16, False)):
        logits = row.to(dtype)[None]
        extra = (torch.zeros(1, V), torch.ones(1)) if guided else ()
        want = logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(topk_logprobs(logits, k, *extra)[1], want)


@pytest.mark.parametrize("size", [600_000, 1_100_000])
@interpreted
@use_backend("triton")
def test_longer_segments(size):
    """Segments of more than one warp; ties lie on both sides of every border."""
    logits = torch.zeros(1, size)
    best = torch.arange(2047, size, 9 * 2048)
    logits[0, torch.cat([best, best + 1])] = 1.0
    k = min(128, 2 * len(best) + 5)
    _, tokens, _ = topk_logprobs(logits, k)
    assert torch.equal(tokens, logits.sort(dim=-1, descending=True, stable=True).indices[:, :k])


@interpreted
def test_k_beyond_the_kernel_is_the_reference_and_never_silent():
    logits = torch.randn(1, 400)
    with use_backend("triton"), pytest.raises(RGTGError, match="its Triton kernel takes k <= 256, not 300"):
        topk_logprobs(logits, 300)
    assert backend_of("topk_logprobs", "cuda", torch.bfloat16, k=256, V=128256) == "triton"
    assert backend_of("topk_logprobs", "cuda", torch.bfloat16, k=300) == "reference"
    assert backend_of("tree_attention", "cuda", torch.bfloat16, D=512) == "reference"
    assert backend_of("tree_attention", "cuda", torch.float64) == "reference"


# --- tree_attention


@pytest.mark.parametrize("mask", [None, "causal", "tree"])
@pytest.mark.parametrize(
    ("T", "lengths"),
    [
        pytest.param(1500, [0, 64, 300, 700, 1100, 1500], id="leaves merged by their last program"),
        pytest.param(
            2 * SPAN + 300, [2 * SPAN + 290, 700], id="leaves by a kernel, spans by their last program"
        ),
    ],
)
@interpreted
@use_backend("triton")
def test_the_cut_of_the_prefix_changes_no_bit(T, lengths, mask):
    """A program per leaf and a program per span are the same sums in the same order; tickets are taken back."""
    shape = {"B": len(lengths), "H": 2, "G": 1, "S": 3, "T": T, "D": 16, "mask": mask}
    arguments = SPECS["tree_attention"].make_inputs({**shape, "lengths": lengths}, torch.float32)
    kernel = SPECS["tree_attention"].kernel
    results = []
    for programs in (1, 1000, 1):
        split = kernel.split_prefix(programs, 6, T, 64, 132)
        assert (split[0] == 0) is (programs == 1)
        with mock.patch.object(kernel, "split_prefix", lambda *_, split=split: split):
            results.append(tree_attention(**arguments))
        assert not tickets(torch.device("cpu"), 1).any()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    # Nor does the length of the cache.
    row = lengths.index(700)
    for name in ("k_cache", "v_cache"):
        arguments[name] = arguments[name][:, :, :700]
    short = {
        key: x[row : row + 1] if isinstance(x, torch.Tensor) and x.shape[0] == len(lengths) else x
        for key, x in arguments.items()
    }
    assert torch.equal(tree_attention(**short), results[0][row : row + 1])


def test_tickets_that_graphs_have_recorded_stay_when_more_are_needed():
    few = tickets(torch.device("cpu"), 10)
    many = tickets(torch.device("cpu"), len(few) + 1)
    assert len(many) > len(few)
    assert any(held is few for held in _tickets[torch.device("cpu"), 0])
    assert tickets(torch.device("cpu"), 10) is many


@interpreted
def test_block_shapes_are_tried_and_those_that_differ_are_left_out():
    from benchmarks.ops import tune

    shape = {"B": 1, "H": 4, "G": 1, "S": 2, "T": 70, "D": 16, "lengths": [70]}
    launched = []
    calls = iter(range(100))

    def time(function, inputs):
        function(inputs[0])
        launched.append(next(calls))
        return (1.0, 10.0 - launched[-1], 20.0)

    kernel = SPECS["tree_attention"].kernel
    own = kernel.configuration
    several = list(tune.candidates(tune.own_settings(shape, torch.bfloat16)))
    assert len(several) == len({tuple(each.items()) for each in several}) > 15
    four = mock.patch.object(tune, "candidates", return_value=several[:4])
    with four:
        rows = tune.tried(shape, 100.0, "cpu", time)
    assert [row["chosen"] for row in rows] == [False, False, False, True], "the fastest first"
    assert [row["us_p50"] for row in rows] == [7.0, 8.0, 9.0, 10.0]
    # Only the launch's own settings change what is launched, and only within.
    assert {row["block_n"] for row in rows} == {32, 64}
    assert kernel.configuration is own

    told = io.StringIO()
    with four, mock.patch.object(tune, "agrees", return_value=False), contextlib.redirect_stdout(told):
        assert tune.tried(shape, 100.0, "cpu", time) == []
    assert "differs from the reference" in told.getvalue()


@interpreted
@use_backend("triton")
def test_many_rows_walk_over_the_whole_prefix():
    shape = {"B": 2, "H": 2, "G": 1, "S": 512, "T": 700, "D": 16, "mask": "causal", "lengths": [0, 600]}
    arguments = SPECS["tree_attention"].make_inputs(shape, torch.float32)
    with use_backend("reference"):
        want = tree_attention(**in_double(arguments))
    compare(tree_attention(**arguments), want, SPECS["tree_attention"].tolerances[torch.float32])


@interpreted
@use_backend("triton")
def test_a_nan_candidate_stays_alone():
    arguments = SPECS["tree_attention"].make_inputs(
        {"B": 1, "H": 4, "G": 2, "S": 8, "T": 300, "D": 16}, torch.float32
    )
    want = tree_attention(**arguments)
    for name in ("q", "k", "v"):
        arguments[name][:, :, 3] = NAN
    got = tree_attention(**arguments)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert got[:, :, 3].isnan().all()
    assert torch.equal(got[:, :, others], want[:, :, others])


@interpreted
@use_backend("triton")
def test_an_empty_prefix_and_a_token_that_sees_nothing():
    make = SPECS["tree_attention"].make_inputs
    arguments = make({"B": 1, "H": 4, "G": 2, "S": 5, "T": 0, "D": 16}, torch.float32)
    assert torch.equal(tree_attention(**arguments), arguments["v"].repeat_interleave(2, dim=1))
    blind = make(
        {"B": 1, "H": 2, "G": 1, "S": 2, "T": 4, "D": 8, "mask": "tree", "lengths": [0]}, torch.float32
    )
    got = tree_attention(**blind)
    assert (got[:, :, 1] == 0).all()
    assert got[:, :, 0].isfinite().all()


@pytest.mark.parametrize("factor", [1e4, 1e-30, 0.0])
@interpreted
@use_backend("triton")
def test_extreme_scores(factor):
    arguments = SPECS["tree_attention"].make_inputs(
        {"B": 1, "H": 2, "G": 1, "S": 3, "T": 600, "D": 16}, torch.float32
    )
    arguments["scale"] = factor
    with use_backend("reference"):
        want = tree_attention(**in_double(arguments))
    torch.testing.assert_close(
        tree_attention(**arguments).double(), want, rtol=0, atol=1e-3 if factor > 1 else 4e-6
    )


# --- resample


@pytest.mark.parametrize("temperature", [0.0, 1e-38, 1.0, 1e30])
@interpreted
@use_backend("triton")
def test_what_is_not_a_number_is_never_silent_and_what_is_excluded_never_chosen(temperature):
    logprobs = torch.tensor(
        [
            [-1.0, -2.0, -INF],
            [-1.0, NAN, -2.0],
            [-1.0, -2.0, -INF],
            [-1.0, -2.0, -3.0],
            [-INF] * 3,
            [-1.0] * 3,
        ]
    )
    rewards = torch.tensor(
        [[0.0, NAN, 0.0], [0.0] * 3, [0.0, 0.0, NAN], [0.0, INF, 0.0], [0.0] * 3, [NAN] * 3]
    )
    logprobs = torch.cat([logprobs, torch.tensor([[-INF, -1.0, -INF]]).expand(20, 3)])
    rewards = torch.cat([rewards, torch.tensor([[INF, 0.0, 5.0]]).expand(20, 3)])
    beta = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0] + [1.0] * 20)
    zero = torch.zeros(26, dtype=torch.int64)
    choice, logprob = resample(
        logprobs, rewards, beta, torch.full((26,), temperature), zero, torch.arange(26)
    )
    assert choice[:5].tolist() == [-1] * 5
    assert logprob[:5].isnan().all()
    assert choice[5] >= 0
    assert (choice[6:] == 1).all()
    assert logprob[5:].isfinite().all()


@pytest.mark.parametrize("K", [1, 3, 5, 64, 65, 513, 4097])
@interpreted
def test_chooses_as_the_reference(K):
    random = torch.Generator().manual_seed(K)
    B = 20
    arguments = (
        torch.randn(B, K, generator=random).log_softmax(-1),
        torch.randn(B, K, generator=random),
        torch.ones(B),
        torch.linspace(0, 2, B),
        torch.randint(-(2**62), 2**62, (B,), generator=random),
        torch.arange(B) * 0x300000001,
    )
    with use_backend("reference"):
        want, want_logprob = resample(*arguments)
    with use_backend("triton"):
        got, got_logprob = resample(*arguments)
    assert torch.equal(got, want)
    torch.testing.assert_close(got_logprob, want_logprob, rtol=2e-6, atol=2e-6)


@interpreted
@use_backend("triton")
def test_zero_temperature_is_the_first_argmax():
    zero = torch.zeros(1, dtype=torch.int64)
    logprobs = torch.full((1, 9000), -2.0)
    logprobs[0, [5000, 8999]] = -1.0
    choice, logprob = resample(logprobs, torch.zeros(1, 9000), torch.ones(1), torch.zeros(1), zero, zero)
    assert (choice.item(), logprob.item()) == (5000, 0.0)


# --- commit


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@interpreted
@use_backend("triton")
def test_commit_moves_every_bit_and_rows_stand_still(dtype):
    arguments = SPECS["commit"].make_inputs({"L": 5, "B": 3, "G": 3, "S": 3, "T": 4, "D": 20}, dtype)
    arguments["lengths"], arguments["choice"] = (
        torch.tensor([9, 4, 9, 3, 9, 0])[1::2],
        torch.tensor([-1, 2, 0]),
    )
    want = copy.deepcopy(arguments)
    with use_backend("reference"):
        commit(**want)
    commit(**arguments)
    for name, x in want.items():
        torch.testing.assert_close(arguments[name], x, rtol=0, atol=0, equal_nan=True)


@interpreted
def test_a_full_cache_is_never_written_past_its_end():
    """On a GPU nobody checks the lengths: the kernel does as the reference does and stays inside."""
    launch = SPECS["commit"].kernel.launch
    room = torch.full((1, 2, 1, 6, 4), -1.0)
    k_cache, v_cache = room[:, :1, :, :4], room[:, 1:, :, :4]
    lengths = torch.tensor([4])
    launch(torch.ones(1, 1, 1, 2, 4), torch.ones(1, 1, 1, 2, 4), k_cache, v_cache, lengths, torch.tensor([1]))
    assert (room[:, :, :, 4:] == -1).all()
    assert (k_cache[0, 0, 0, 3] == 1).all()
    launch(torch.ones(1, 1, 1, 2, 4), torch.ones(1, 1, 1, 2, 4), k_cache, v_cache, lengths, torch.tensor([2]))
    assert lengths.tolist() == [5]


# --- partial_bt_loss


@pytest.mark.parametrize("mode", ["eos", "repeat_last", "truncate"])
@pytest.mark.parametrize("weight", ["prefix", "pair"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@interpreted
def test_loss_and_gradient_of_every_mode(mode, weight, dtype):
    """Lengths on both sides of a block; more pairs than are counted at a time in the last case."""
    for shape in ({"N": 6, "T": 300}, {"N": 3, "T": 1, "normalizer": True}, {"N": 270, "T": 2}):
        arguments = SPECS["partial_bt_loss"].make_inputs({**shape, "mode": mode, "weight": weight}, dtype)
        results = []
        for backend, case in (("reference", in_double(arguments)), ("triton", arguments)):
            rewards = case.pop("rewards").requires_grad_()
            with use_backend(backend):
                loss = partial_bt_loss(rewards, **case)
            loss.backward()
            results.append((loss.detach(), rewards.grad))
        tolerance = SPECS["partial_bt_loss"].tolerances[torch.float32]
        compare(results[1][0], results[0][0], tolerance)
        # The gradient has the rewards' dtype.
        compare(
            results[1][1],
            results[0][1].to(dtype),
            Tolerance(4e-3, 8e-3) if dtype.itemsize == 2 else tolerance,
        )


@interpreted
@use_backend("triton")
def test_extreme_rewards_and_nan_stay_in_their_pair():
    rewards = torch.tensor([1e4, -1e4, -1e4, 1e4, 0.0, 1.0, NAN, 0.0], requires_grad=True)
    offsets = torch.tensor([0, 2, 4, 5, 6, 7, 8])
    loss = partial_bt_loss(rewards[:6], offsets[:5], "eos")
    assert loss.item() == pytest.approx((0 + 2e4 + math.log1p(math.e)) / 3)
    loss = partial_bt_loss(rewards, offsets, "eos")
    loss.backward()
    assert loss.isnan()
    assert rewards.grad is not None
    assert rewards.grad[:6].isfinite().all()
    assert rewards.grad[6:].isnan().all()


@pytest.mark.parametrize(
    ("offsets", "mode"),
    [
        ([0, 2, 3], "eos"),
        ([0, 2, 2], "repeat_last"),
        ([0, 1, 4], "repeat_last"),
        ([1, 2, 3], "repeat_last"),
        ([0, 9, 3], "truncate"),
    ],
)
@interpreted
def test_offsets_that_do_not_fit_give_nan(offsets, mode):
    """On a GPU nobody checks them: the kernel must not read or write outside."""
    launch = SPECS["partial_bt_loss"].kernel.launch
    buffer = torch.zeros(40)
    loss, _ = launch(buffer[8:11], torch.tensor(offsets), mode, "prefix", None)
    assert loss.isnan()


# --- all of them together


@pytest.mark.parametrize(("rows", "tokens"), [(2, 2), pytest.param(5, 6, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("guide", "support"), [("sequence", "lm"), ("genarm", "combined"), ("farma", "all")])
@interpreted
def test_decoding_gives_what_the_references_give(guide, support, rows, tokens):
    guidance = [Guidance(3 + i % 3, 1.0, 0.9 * (i % 2), support=support) for i in range(rows)]

    def decoded(backend: str) -> Any:
        with use_backend(backend):
            return as_numbers(
                make_decoder(guide).generate(prompts_of(rows), tokens, guidance, list(range(rows)))
            )

    assert decoded("triton") == decoded("reference")
