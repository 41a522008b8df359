"""tree_attention against plain softmax attention, at every edge."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from rgtg_fast import RGTGError
from rgtg_fast.ops import _extension, tree_attention, use_backend
from tests.ops.specs import SPECS

BACKENDS = ["reference"] if _extension.missing_reason() else ["reference", "cpp"]
SPEC = SPECS["tree_attention"]


def position(s: int, b: int, ancestors: torch.Tensor | None, causal: bool) -> int:
    """Of new token s, counted from the end of the prefix."""
    if causal:
        return s
    if ancestors is None:
        return 0
    return max(bin(int(ancestors[b, s]) % 2**64).count("1") - 1, 0)


def visible(s: int, j: int, b: int, ancestors: torch.Tensor | None, causal: bool, window: int | None) -> bool:
    if window and position(j, b, ancestors, causal) <= position(s, b, ancestors, causal) - window:
        return False
    if causal:
        return j <= s
    if ancestors is None:
        return j == s
    return bool(int(ancestors[b, s]) >> j & 1)


def naive(
    q,
    k,
    v,
    k_cache,
    v_cache,
    lengths,
    ancestors,
    scale,
    causal,
    window=None,
    softcap=None,
    sinks=None,
    slots=None,
):
    """One query at a time, in float64, over exactly what it sees."""
    B, H, S, D = q.shape
    if slots is not None:
        k_cache, v_cache, lengths = (torch.stack([x[i] for i in slots]) for x in (k_cache, v_cache, lengths))
    group = H // k.shape[1]
    out = torch.zeros(B, H, S, D, dtype=torch.float64)
    for b in range(B):
        T = int(lengths[b])
        for h in range(H):
            g = h // group
            for s in range(S):
                seen = [j for j in range(S) if visible(s, j, b, ancestors, causal, window)]
                first = max(0, T + position(s, b, ancestors, causal) - window + 1) if window else 0
                keys = torch.cat([k_cache[b, g, first:T], k[b, g, seen]]).double()
                values = torch.cat([v_cache[b, g, first:T], v[b, g, seen]]).double()
                scores = keys @ q[b, h, s].double() * scale
                if softcap:
                    scores = softcap * (scores / softcap).tanh()
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h : h + 1].double()])
                    values = torch.cat([values, values.new_zeros(1, D)])
                if len(scores):
                    out[b, h, s] = scores.softmax(0) @ values
    return out


@st.composite
def problems(draw):
    G = draw(st.integers(1, 3))
    shape = {
        "B": draw(st.integers(1, 3)),
        "G": G,
        "H": G * draw(st.integers(1, 4)),
        "S": draw(st.integers(1, 9)),
        "T": draw(st.integers(0, 70)),
        "D": draw(st.integers(1, 36)),
        "mask": draw(st.sampled_from([None, "causal", "chain", "tree"])),
        "window": draw(st.sampled_from([None, 1, 2, 5, 40, 100])),
        "softcap": draw(st.sampled_from([None, None, 0.5, 30.0])),
        "sinks": draw(st.booleans()),
    }
    shape["slots"] = draw(st.sampled_from([None, shape["B"], shape["B"] + 2]))
    shape["lengths"] = draw(st.lists(st.integers(0, shape["T"]), min_size=shape["B"], max_size=shape["B"]))
    return shape


@pytest.mark.parametrize("backend", BACKENDS)
@given(shape=problems(), seed=st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_equals_the_definition(backend, shape, seed):
    arguments = SPEC.make_inputs(shape, torch.float32, seed=seed)
    with use_backend(backend):
        got = tree_attention(**arguments)
    torch.testing.assert_close(got.double(), naive(**arguments), rtol=0, atol=4e-6)


def test_the_float64_reference_is_exact():
    for mask in (None, "causal", "chain", "tree"):
        arguments = SPEC.make_inputs(
            {"B": 2, "H": 4, "G": 2, "S": 6, "T": 30, "D": 8, "mask": mask, "lengths": [30, 0]}, torch.float64
        )
        torch.testing.assert_close(tree_attention(**arguments), naive(**arguments), rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_prefix_gives_back_the_token_itself(backend):
    arguments = SPEC.make_inputs({"B": 1, "H": 4, "G": 2, "S": 5, "T": 0, "D": 16}, torch.float32)
    with use_backend(backend):
        got = tree_attention(**arguments)
    assert torch.equal(got, arguments["v"].repeat_interleave(2, dim=1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_that_sees_nothing_yields_zeros(backend):
    arguments = SPEC.make_inputs(
        {"B": 1, "H": 2, "G": 1, "S": 2, "T": 4, "D": 8, "mask": "tree", "lengths": [0]}, torch.float32
    )
    with use_backend(backend):
        got = tree_attention(**arguments)
    assert (got[:, :, 1] == 0).all()
    assert got[:, :, 0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_candidate_stays_alone(backend, dtype):
    arguments = SPEC.make_inputs({"B": 1, "H": 4, "G": 2, "S": 8, "T": 300, "D": 16}, dtype)
    with use_backend(backend):
        want = tree_attention(**arguments)
        for name in ("q", "k", "v"):
            arguments[name][:, :, 3] = float("nan")
        got = tree_attention(**arguments)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert got[:, :, 3].isnan().all()
    assert torch.equal(got[:, :, others], want[:, :, others])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [1e4, 1e-30, 0.0])
def test_extreme_scores(backend, factor):
    arguments = SPEC.make_inputs({"B": 2, "H": 2, "G": 1, "S": 3, "T": 600, "D": 16}, torch.float32)
    arguments["scale"] = factor
    with use_backend(backend):
        got = tree_attention(**arguments)
    want = naive(**arguments)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-3 if factor > 1 else 4e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 1, 20, 100])
def test_masks_chain_and_causal_agree(backend, dtype, window):
    shape = {"B": 2, "H": 6, "G": 2, "S": 64, "T": 90, "D": 32, "window": window}
    with use_backend(backend):
        chain = tree_attention(**SPEC.make_inputs({**shape, "mask": "chain"}, dtype))
        causal = tree_attention(**SPEC.make_inputs({**shape, "mask": "causal"}, dtype))
    assert torch.equal(chain, causal)


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("mask", [None, "causal"])
@pytest.mark.parametrize("D", [64, 40, 5])
def test_bfloat16_adds_little_to_the_rounding_of_its_output(D, mask):
    """Its weights may be rounded for the product with the values, as in torch's own bfloat16 attention."""
    prefix = 400 if mask is None else 0
    shape = {"B": 1, "H": 6, "G": 2, "S": 10 if prefix else 300, "T": prefix, "D": D, "mask": mask}
    arguments = SPEC.make_inputs(shape, torch.bfloat16)
    exact = tree_attention(**{name: _double(x) for name, x in arguments.items()})

    def error(x: torch.Tensor) -> torch.Tensor:
        return (x.double() - exact).square().mean().sqrt()

    assert error(tree_attention(**arguments)) <= 1.4 * error(exact.bfloat16())


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", [32, 40])
@pytest.mark.parametrize(("mask", "window"), [(None, 0), ("causal", 0), (None, 170), ("causal", 50)])
def test_more_new_tokens_change_no_bit_of_the_first(dtype, D, mask, window):
    """A short prompt has the same bits when it is padded to the length of a longer one in its batch."""
    shape = {"B": 1, "H": 6, "G": 2, "S": 150, "T": 300, "D": D, "mask": mask, "window": window}
    arguments = SPEC.make_inputs(shape, dtype)
    whole = tree_attention(**arguments)
    for S in (1, 7, 41, 100):
        short = {**arguments, **{name: arguments[name][:, :, :S] for name in ("q", "k", "v")}}
        assert torch.equal(tree_attention(**short), whole[:, :, :S])


@pytest.mark.usefixtures("cpp")
def test_more_room_in_the_cache_changes_no_bit():
    arguments = SPEC.make_inputs(
        {"B": 2, "H": 6, "G": 2, "S": 4, "T": 700, "D": 32, "lengths": [300, 17]}, torch.float32
    )
    want = tree_attention(**arguments)
    arguments["k_cache"], arguments["v_cache"] = (
        arguments["k_cache"][:, :, :300],
        arguments["v_cache"][:, :, :300],
    )
    assert torch.equal(tree_attention(**arguments), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", [None, "causal", "tree"])
@pytest.mark.parametrize("window", [241, 2**31 - 1, 2**80])
def test_a_window_that_nothing_leaves_changes_no_bit(backend, mask, window):
    shape = {"B": 2, "H": 6, "G": 2, "S": 9, "T": 232, "D": 20, "mask": mask, "lengths": [232, 0]}
    arguments = SPEC.make_inputs(shape, torch.float32)
    with use_backend(backend):
        assert torch.equal(tree_attention(**{**arguments, "window": window}), tree_attention(**arguments))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("more", [{}, {"mask": "causal"}, {"window": 150, "mask": "tree", "sinks": True}])
def test_a_slot_has_the_bits_of_a_cache_of_its_own(backend, dtype, more):
    """The other slots hold NaN and lengths outside the cache; two rows may read one slot."""
    shape = {"B": 3, "H": 6, "G": 2, "S": 5, "T": 300, "D": 32, "lengths": [0, 300, 161], "slots": 7, **more}
    arguments = SPEC.make_inputs(shape, dtype)
    slots = arguments["slots"]
    own = {name: arguments[name][slots] for name in ("k_cache", "v_cache", "lengths")}
    with use_backend(backend):
        got = tree_attention(**arguments)
        assert torch.equal(got, tree_attention(**{**arguments, **own, "slots": None}))
        twice = {name: x[[2, 1, 2]] for name, x in own.items()}
        gaps = torch.stack([slots[[2, 1, 2]]] * 2, 1)[:, 0]
        want = tree_attention(**{**arguments, **twice, "slots": None})
        assert torch.equal(tree_attention(**{**arguments, "slots": gaps}), want)


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [1, 2, 64, 129, 300])
def test_a_window_is_a_prefix_that_begins_later(dtype, window):
    """Bit for bit: what lies before it does not even change how the sums are split."""
    arguments = SPEC.make_inputs(
        {"B": 1, "H": 6, "G": 2, "S": 4, "T": 700, "D": 32, "lengths": [600], "window": window}, dtype
    )
    first = 600 - window + 1
    later = {name: arguments[name][:, :, first:] for name in ("k_cache", "v_cache")}
    later |= {"lengths": torch.tensor([window - 1]), "window": None}
    assert torch.equal(tree_attention(**arguments), tree_attention(**{**arguments, **later}))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_sinks_that_take_all_leave_zeros(backend, softcap):
    shape = {"B": 2, "H": 2, "G": 1, "S": 2, "T": 4, "D": 8, "mask": "tree", "lengths": [0, 4], "sinks": True}
    arguments = {**SPEC.make_inputs(shape, torch.float32), "softcap": softcap}
    with use_backend(backend):
        got = tree_attention(**arguments)
        assert (got[0, :, 1] == 0).all(), "only its sink is visible to this token"
        assert (got[0, :, 0] != 0).all()
        arguments["sinks"] = torch.tensor([1e30, float("-inf")])
        got = tree_attention(**arguments)
        arguments["sinks"] = None
        want = tree_attention(**arguments)
    assert (got[:, 0] == 0).all()
    torch.testing.assert_close(got[:, 1], want[:, 1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prefix", [0, 3])
def test_a_token_whose_own_score_is_minus_infinity_sees_its_prefix_alone(backend, prefix):
    arguments = SPEC.make_inputs({"B": 1, "H": 1, "G": 1, "S": 1, "T": prefix, "D": 4}, torch.float32)
    arguments["q"][...], arguments["k"][...] = 1.0, float("-inf")
    with use_backend(backend):
        got = tree_attention(**arguments)
    keys, values = arguments["k_cache"][0, 0], arguments["v_cache"][0, 0]
    want = (keys.sum(-1) * arguments["scale"]).softmax(0) @ values if prefix else torch.zeros(4)
    torch.testing.assert_close(got[0, 0, 0], want)


def whole(arguments, window):
    """The prompt of one row as a model without a cache sees it: queries, keys, values, and what the mask adds."""
    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    keys, values = torch.cat([arguments["k_cache"], k], 2), torch.cat([arguments["v_cache"], v], 2)
    S, N = arguments["q"].shape[2], keys.shape[2]
    at, key = torch.arange(N - S, N)[:, None], torch.arange(N)
    seen = (key <= at) & (key > at - window)
    return q, keys, values, seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("T", "window"), [(0, 7), (40, 7), (200, 150), (3, 64)])
def test_equals_torch_attention_with_an_explicit_mask(backend, T, window):
    shape = {"B": 2, "H": 4, "G": 2, "S": 20, "T": T, "D": 16, "mask": "causal", "lengths": [T, T]}
    arguments = SPEC.make_inputs(shape, torch.float32)
    q, keys, values, seen = whole(arguments, window)
    want = functional.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True)
    with use_backend(backend):
        torch.testing.assert_close(tree_attention(**{**arguments, "window": window}), want, rtol=0, atol=4e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_equals_the_attention_of_transformers(backend, family):
    """Their eager attention with a softcap, and with sinks, over their sliding window."""
    from transformers.masking_utils import sliding_window_overlay

    shape = {"B": 2, "H": 4, "G": 2, "S": 20, "T": 50, "D": 16, "mask": "causal", "lengths": [50, 50]}
    arguments = SPEC.make_inputs({**shape, "sinks": family == "gpt_oss"}, torch.float32)
    arguments |= {"window": 12, "softcap": 1.5 if family == "gemma2" else None}
    q, keys, values, _ = whole(arguments, 12)
    inside = sliding_window_overlay(12)
    seen = [[j <= i and inside(0, 0, i, j) for j in range(70)] for i in range(50, 70)]
    mask = torch.zeros(20, 70).masked_fill(~torch.tensor(seen), float("-inf"))
    module = SimpleNamespace(training=False, num_key_value_groups=2, sinks=arguments["sinks"])
    own = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    more = {"softcap": 1.5} if family == "gemma2" else {}
    want, _ = own.eager_attention_forward(module, q, keys, values, mask, scaling=arguments["scale"], **more)
    with use_backend(backend):
        got = tree_attention(**arguments)
    torch.testing.assert_close(got.transpose(1, 2), want, rtol=0, atol=4e-6)


def test_inputs_are_left_alone():
    arguments = SPEC.make_inputs({"B": 2, "H": 6, "G": 2, "S": 4, "T": 70, "D": 32}, torch.float32)
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    tree_attention(**arguments)
    for name, x in before.items():
        torch.testing.assert_close(arguments[name], x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.tensor([3, 9])}, r"lengths\[1\]=9 is outside the cache \(T=8\): use 0 to 8"),
        ({"lengths": torch.tensor([-1, 2])}, r"lengths\[0\]=-1 is outside the cache \(T=8\): use 0 to 8"),
        ({"lengths": torch.tensor([1])}, r"lengths has shape \[1\]: use \[B\] = \[2\]"),
        (
            {"lengths": torch.tensor([1, 2], dtype=torch.int32)},
            "lengths has dtype torch.int32: use torch.int64",
        ),
        (
            {"k": torch.zeros(2, 3, 5, 16)},
            r"k has shape \[2, 3, 5, 16\]: use \[B, G, S, D\] = \[2, 2, 5, 16\]",
        ),
        (
            {"q": torch.zeros(2, 5, 5, 16)},
            "5 query heads cannot share 2 key-value heads: H must be a multiple of G",
        ),
        ({"q": torch.zeros(2, 4, 16)}, r"q has shape \[2, 4, 16\]"),
        ({"v": torch.zeros(2, 2, 5, 16).double()}, "dtypes differ"),
        ({"causal": True, "ancestors": torch.zeros(2, 5, dtype=torch.int64)}, "exclude each other: give one"),
        (
            {"ancestors": torch.zeros(2, 4, dtype=torch.int64)},
            r"ancestors has shape \[2, 4\]: use \[B, S\] = \[2, 5\]",
        ),
        ({"window": -1}, "window=-1: use a whole number of positions >= 1, or None"),
        ({"window": 2.0}, "window=2.0: use a whole number"),
        ({"window": True}, "window=True: use a whole number"),
        ({"softcap": -5.0}, "softcap=-5.0: use 1e-30 to 1e30, or None"),
        ({"softcap": float("nan")}, "softcap=nan: use 1e-30"),
        ({"softcap": "50"}, "softcap='50': use 1e-30"),
        ({"sinks": torch.zeros(5)}, r"sinks has shape \[5\]: use \[H\] = \[4\]"),
        ({"sinks": torch.zeros(4).half()}, "sinks has dtype torch.float16: use torch.float32"),
        ({"slots": torch.tensor([1, 2])}, r"slots\[1\]=2 is outside the cache \(N=2\): use 0 to 1"),
        ({"slots": torch.tensor([-1, 0])}, r"slots\[0\]=-1 is outside the cache \(N=2\): use 0 to 1"),
        ({"slots": torch.tensor([1])}, r"slots has shape \[1\]: use \[B\] = \[2\]"),
        ({"slots": torch.tensor([1.0, 0.0])}, "slots has dtype torch.float32: use torch.int64"),
        (
            {"slots": torch.tensor([0, 1]), "lengths": torch.tensor([1])},
            r"lengths has shape \[1\]: use \[N\] = \[2\]",
        ),
        (
            {"slots": torch.tensor([1, 0]), "lengths": torch.tensor([3, 9])},
            r"lengths\[1\]=9 is outside the cache \(T=8\): use 0 to 8",
        ),
        (
            {
                "slots": torch.tensor([0, 0]),
                "k_cache": torch.zeros(0, 2, 8, 16),
                "v_cache": torch.zeros(0, 2, 8, 16),
                "lengths": torch.zeros(0, dtype=torch.int64),
            },
            "k_cache has no slots for 2 rows: use N >= 1",
        ),
    ],
)
def test_bad_input_is_one_line(backend, change, message):
    arguments = SPEC.make_inputs({"B": 2, "H": 4, "G": 2, "S": 5, "T": 8, "D": 16}, torch.float32)
    with use_backend(backend), pytest.raises(RGTGError, match=message) as error:
        tree_attention(**{**arguments, **change})
    assert "\n" not in str(error.value)


def test_masks_have_64_bits():
    arguments = SPEC.make_inputs({"B": 1, "H": 1, "G": 1, "S": 65, "T": 0, "D": 1}, torch.float32)
    arguments["ancestors"] = torch.zeros(1, 65, dtype=torch.int64)
    with pytest.raises(RGTGError, match="S=65 exceeds the 64 bits of a mask: use S <= 64"):
        tree_attention(**arguments)
