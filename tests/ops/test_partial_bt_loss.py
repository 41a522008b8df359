"""partial_bt_loss: against the sum written out prefix by prefix, its gradient, extremes, and what it refuses."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rgtg_fast import RGTGError
from rgtg_fast.ops import _extension, partial_bt_loss, partial_bt_terms, use_backend
from rgtg_fast.ops.partial_bt_loss import MODES, WEIGHTS
from tests.ops.specs import SPECS

BACKENDS = ["reference"] if _extension.missing_reason() else ["reference", "cpp"]
SPEC = SPECS["partial_bt_loss"]
NAN, INF = math.nan, math.inf


def offsets_of(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def written_out(
    rewards: torch.Tensor, offsets: torch.Tensor, mode: str, weight: str, normalizer: float | None = None
) -> torch.Tensor:
    """Term by term in scalars, for autograd: what the formula says and nothing else."""
    ends = offsets.tolist()
    answers = [list(rewards[a:b]) for a, b in pairwise(ends)]
    total, count = rewards.new_zeros(()), 0.0
    for chosen, rejected in zip(answers[::2], answers[1::2], strict=True):
        if mode == "repeat_last":
            while len(chosen) < len(rejected):
                chosen = [*chosen, chosen[-1]]
            while len(rejected) < len(chosen):
                rejected = [*rejected, rejected[-1]]
        terms = [-F.logsigmoid(a - b) for a, b in zip(chosen, rejected, strict=mode != "truncate")]
        total = total + (sum(terms) / len(terms) if weight == "pair" else sum(terms))
        count += 1 if weight == "pair" else len(terms)
    return total / (count if normalizer is None else normalizer)


def loss_and_gradient(function, rewards, *rest):
    rewards = rewards.detach().clone().requires_grad_()
    loss = function(rewards, *rest)
    (gradient,) = torch.autograd.grad(loss, rewards)
    return loss.detach(), gradient


@st.composite
def batches(draw):
    mode, weight = draw(st.sampled_from(MODES)), draw(st.sampled_from(WEIGHTS))
    length = st.integers(1, 12)
    pairs = draw(st.lists(st.tuples(length, length), min_size=1, max_size=6))
    lengths = [n for a, b in pairs for n in ((a, a) if mode == "eos" else (a, b))]
    # 1e4 in float64 stands for what overflows a naive log(1 + e^x).
    value = st.one_of(st.floats(-30, 30), st.sampled_from([1e4, -1e4, 0.0]))
    rewards = draw(st.lists(value, min_size=sum(lengths), max_size=sum(lengths)))
    normalizer = draw(st.none() | st.floats(0.5, 100))
    return torch.tensor(rewards, dtype=torch.float64), offsets_of(*lengths), mode, weight, normalizer


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=150)
@given(batch=batches())
def test_equals_the_formula_written_out(backend, batch):
    rewards, offsets, mode, weight, normalizer = batch
    want = loss_and_gradient(written_out, rewards, offsets, mode, weight, normalizer)
    z = None if normalizer is None else torch.tensor(normalizer)
    with use_backend(backend):
        got = loss_and_gradient(partial_bt_loss, rewards, offsets, mode, weight, z)
    # The normalizer comes in as float32.
    rtol = 1e-12 if z is None else 1e-6
    for a, b in zip(got, want, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-14)
    if normalizer is None:
        own = torch.tensor(partial_bt_terms(offsets, mode, weight), dtype=torch.float64)
        with use_backend(backend):
            again = loss_and_gradient(partial_bt_loss, rewards, offsets, mode, weight, own)
        for a, b in zip(got, again, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(backend, mode, weight):
    arguments = SPEC.make_inputs(
        {"N": 4, "T": 7, "mode": mode, "weight": weight, "normalizer": weight == "pair"}, torch.float64
    )
    rewards = arguments.pop("rewards").requires_grad_()
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda r: partial_bt_loss(r, **arguments), (rewards,))


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SPEC.shapes, ids=str)
def test_cpp_gradient_equals_the_float64_reference(shape, dtype, compare, monkeypatch):
    """The kernel's own outputs start as NaN, so that no position is left out."""
    arguments = SPEC.make_inputs(shape, dtype)
    wide = copy.deepcopy(arguments) | {"rewards": arguments["rewards"].double()}
    with use_backend("reference"):
        _, want = loss_and_gradient(partial_bt_loss, *wide.values())
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(NAN))
    with use_backend("cpp"):
        _, got = torch.ops.rgtg_fast.partial_bt_loss(*arguments.values())
    compare(got, want, SPEC.tolerances[dtype])


@pytest.mark.parametrize("shape", SPEC.shapes[:3], ids=str)
def test_opcheck_with_a_gradient(shape):
    arguments = SPEC.make_inputs(shape, torch.float32)
    arguments["rewards"].requires_grad_()
    torch.library.opcheck(torch.ops.rgtg_fast.partial_bt_loss.default, tuple(arguments.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_rewards_do_not_overflow(backend):
    rewards = torch.tensor([1e4, 1e4, -1e4, -1e4, -1e4, -1e4, 1e4, 1e4])
    with use_backend(backend):
        loss, gradient = loss_and_gradient(partial_bt_loss, rewards, offsets_of(2, 2, 2, 2), "eos")
    assert loss.item() == 1e4
    assert gradient.tolist() == [0, 0, 0, 0, -0.25, -0.25, 0.25, 0.25]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_well_separated_pair_keeps_its_small_loss(backend):
    """log(1 + e^-30) is e^-30, not 0: a float32 sum 1 + e^-30 would lose it."""
    with use_backend(backend):
        loss, gradient = loss_and_gradient(partial_bt_loss, torch.tensor([30.0, 0.0]), offsets_of(1, 1))
    assert loss.item() == pytest.approx(math.exp(-30), rel=1e-6)
    assert gradient.tolist() == pytest.approx([-math.exp(-30), math.exp(-30)], rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_what_is_not_a_number_reaches_the_loss_and_stays_in_its_pair(backend, bad):
    rewards = torch.tensor([0.0, 1.0, bad, bad, 2.0, 0.5])
    with use_backend(backend):
        loss, gradient = loss_and_gradient(partial_bt_loss, rewards, offsets_of(1, 1, 1, 1, 1, 1))
    assert loss.isnan()
    assert gradient[[0, 1, 4, 5]].isfinite().all()
    assert gradient[2:4].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_truncate_ignores_what_it_does_not_compare(backend):
    rewards = torch.tensor([0.5, NAN, NAN, 0.25])
    with use_backend(backend):
        loss, gradient = loss_and_gradient(partial_bt_loss, rewards, offsets_of(3, 1), "truncate")
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.25)), rel=1e-6)
    assert gradient[1:3].tolist() == [0, 0]
    assert gradient[0] == -gradient[3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_of_one_step_add_up(backend):
    """Two batches with the step's normalizer are the loss of one: accumulation and processes change nothing."""
    random = torch.Generator().manual_seed(5)
    first, second = (torch.randn(n, generator=random, dtype=torch.float64) for n in (9, 12))
    offsets = offsets_of(4, 5), offsets_of(1, 6, 3, 2)
    joined = torch.cat([offsets[0], offsets[1][1:] + 9])
    for weight in WEIGHTS:
        z = torch.tensor(
            sum(partial_bt_terms(o, "repeat_last", weight) for o in offsets), dtype=torch.float64
        )
        with use_backend(backend):
            whole = partial_bt_loss(torch.cat([first, second]), joined, "repeat_last", weight)
            parts = [
                partial_bt_loss(r, o, "repeat_last", weight, z)
                for r, o in zip((first, second), offsets, strict=True)
            ]
        torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-14, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_pair_is_no_loss_where_others_count(backend):
    with use_backend(backend):
        loss = partial_bt_loss(torch.zeros(0), offsets_of(), "repeat_last", normalizer=torch.tensor(7.0))
    assert loss.item() == 0


def test_dtypes():
    for dtype, wide in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        rewards = torch.zeros(2, dtype=dtype, requires_grad=True)
        loss = partial_bt_loss(rewards, offsets_of(1, 1))
        assert loss.dtype == wide
        loss.backward()
        assert rewards.grad is not None
        assert rewards.grad.dtype == dtype


def test_terms():
    offsets = offsets_of(3, 5, 2, 1)
    assert partial_bt_terms(offsets, "repeat_last") == 7.0
    assert partial_bt_terms(offsets, "truncate") == 4.0
    assert partial_bt_terms(offsets, "repeat_last", "pair") == 2.0
    with pytest.raises(
        RGTGError, match="partial_bt_terms: there is no mode 'padded': use one of eos, repeat_last"
    ):
        partial_bt_terms(offsets, "padded")


def test_the_old_name_of_a_mode_works_and_warns():
    rewards, offsets = torch.tensor([0.0, 2.0, 0.0]), offsets_of(2, 1)
    with pytest.warns(DeprecationWarning, match="mode='hold' is now mode='repeat_last'") as told:
        loss, terms = partial_bt_loss(rewards, offsets, mode="hold"), partial_bt_terms(offsets, "hold")
    assert [warning.filename for warning in told] == [__file__] * 2
    assert loss == partial_bt_loss(rewards, offsets, mode="repeat_last")
    assert terms == partial_bt_terms(offsets, "repeat_last")


def test_is_not_differentiated_twice():
    rewards = torch.zeros(2, requires_grad=True)
    loss = partial_bt_loss(rewards, offsets_of(1, 1))
    (gradient,) = torch.autograd.grad(loss * loss, rewards, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_compiles_as_one_graph():
    offsets = offsets_of(3, 5, 2, 1)

    def step(x: torch.Tensor) -> torch.Tensor:
        return partial_bt_loss(2 * x, offsets, "repeat_last", "pair")

    x = torch.linspace(-1, 1, 11)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(loss_and_gradient(compiled, x), loss_and_gradient(step, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("lengths", "M", "mode", "message"),
    [
        (
            (2, 3),
            5,
            "eos",
            "pair 0 has answers of 2 and 3 tokens, .* pad the shorter with EOS, or use 'repeat_last'",
        ),
        (
            (2, 2, 0, 1),
            5,
            "repeat_last",
            "the chosen answer of pair 1 has 0 tokens: every answer needs at least one",
        ),
        ((2, -1), 1, "repeat_last", "the rejected answer of pair 0 has -1 tokens"),
        ((2, 2), 5, "repeat_last", "offsets go from 0 to 4: they must go from 0 to M=5"),
    ],
)
def test_bad_offsets_are_named(backend, lengths, M, mode, message):
    with use_backend(backend), pytest.raises(RGTGError, match=message):
        partial_bt_loss(torch.zeros(M), offsets_of(*lengths), mode)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": torch.zeros(2, 1)}, r"rewards have shape \[2, 1\]: use \[M\]"),
        ({"rewards": torch.zeros(2, dtype=torch.int64)}, "rewards has dtype torch.int64"),
        ({"offsets": offsets_of(2)}, r"offsets have shape \[2\]: use \[2N \+ 1\]"),
        ({"offsets": offsets_of(1, 1).int()}, "offsets has dtype torch.int32: use torch.int64"),
        ({"weight": "token"}, "there is no weight 'token': use one of prefix, pair"),
        ({"normalizer": torch.ones(1)}, r"normalizer has shape \[1\]: use a scalar"),
        ({"rewards": torch.zeros(0), "offsets": offsets_of()}, "there is no pair to average over"),
    ],
)
def test_bad_input_is_one_line(change, message):
    with pytest.raises(RGTGError, match=message) as error:
        partial_bt_loss(**{"rewards": torch.zeros(2), "offsets": offsets_of(1, 1)} | change)
    assert "\n" not in str(error.value)
