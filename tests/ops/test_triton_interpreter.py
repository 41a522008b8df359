"""The Triton kernels against the reference, in Triton's interpreter."""

from __future__ import annotations

import copy
import math
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
    use_backend,
)
from tests.covering import daily, each
from tests.engine.support import prompts_of
from tests.engine.test_ahead import as_numbers, make_decoder
from tests.ops.interpreted import interpreted, missing_reason
from tests.ops.specs import SPECS, Tolerance, call, in_double, row_of
from tests.ops.support import cases_of, compare, shape_and_dtype

pytestmark = pytest.mark.triton
if missing_reason():
    pytest.skip(missing_reason(), allow_module_level=True)
INF, NAN = math.inf, math.nan

# Small enough for an interpreter that walks through every program one by one; the same edges as the specs' own.
SHAPES = {name: spec.shapes for name, spec in SPECS.items()} | {
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
    several = [shape for shape in SHAPES[name] if shape["B"] > 1]
    for shape in several[:1] + [shape for shape in several if "window" in shape][:1]:
        arguments = SPECS[name].make_inputs(shape, torch.float32)
        whole = call(name, arguments)
        for row in range(shape["B"]):
            for a, b in zip(call(name, row_of(arguments, row)), whole, strict=True):
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
        buffer = torch.full([2 * n for n in x.shape[:-1]] + [x.shape[-1] + 3], NAN)
        view = buffer[tuple(slice(None, None, 2) for _ in x.shape[:-1])][..., : x.shape[-1]]
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
    room, new = torch.full((1, 2, 1, 6, 4), -1.0), torch.ones(1, 1, 1, 2, 4)
    k_cache, v_cache = room[:, :1, :, :4], room[:, 1:, :, :4]
    lengths = torch.tensor([4])
    launch(new, new, k_cache, v_cache, lengths, torch.tensor([1]), None)
    assert (room[:, :, :, 4:] == -1).all()
    assert (k_cache[0, 0, 0, 3] == 1).all()
    launch(new, new, k_cache, v_cache, lengths, torch.tensor([2]), None)
    assert lengths.tolist() == [5]


@interpreted
def test_a_row_with_a_slot_outside_the_cache_stands_still():
    """On a GPU nobody checks the slots: nothing is written outside."""
    launch = SPECS["commit"].kernel.launch
    new, room = torch.ones(2, 3, 1, 2, 4), torch.zeros(2, 4, 1, 4, 4)
    k_cache, v_cache, lengths = room[:, 1:3], room[:, 1:3].clone(), torch.tensor([7, 2, 0, 7])
    choice, slots = torch.tensor([1, 0, 1]), torch.tensor([2, 1, -1])
    launch(new, new, k_cache, v_cache, lengths[1:3], choice, slots)
    assert lengths.tolist() == [7, 2, 1, 7]
    assert room.sum() == v_cache.sum() == k_cache[:, 1, :, 0].sum() == 8


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
