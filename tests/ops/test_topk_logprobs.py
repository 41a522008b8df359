"""topk_logprobs against its definition, at every edge."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rgtg_fast import RGTGError
from rgtg_fast.ops import _extension, topk_logprobs, use_backend

BACKENDS = ["reference"] if _extension.missing_reason() else ["reference", "cpp"]
INF = math.inf

# Few distinct values, so that ties are the rule; −inf among them.
LOGIT = st.sampled_from([-INF, -3.0, -0.0, 0.0, 0.5, 0.5000001, 2.0, 30.0])
ROWS = st.integers(1, 40).flatmap(
    lambda V: st.lists(st.lists(LOGIT, min_size=V, max_size=V), min_size=1, max_size=4)
)


def naive(logits: list[float], k: int, guidance: list[float] | None, beta: float):
    """One row in plain Python."""
    peak = max(logits)
    log_total = peak + math.log(sum(math.exp(x - peak) for x in logits))
    scores = list(logits)
    if guidance is not None and beta != 0:
        # As float32 rounds it: the product, then the sum.
        product = torch.tensor(guidance) * beta
        scores = (torch.tensor(logits) + product).tolist()
    order = sorted(range(len(logits)), key=lambda v: (-scores[v], v))[:k]
    logprobs = [x - log_total for x in logits]
    entropy = -sum(math.exp(x) * x for x in logprobs if x > -INF)
    return order, [logprobs[v] for v in order], entropy


@pytest.mark.parametrize("backend", BACKENDS)
@given(rows=ROWS, data=st.data())
@settings(deadline=None, max_examples=150)
def test_equals_the_definition(backend, rows, data):
    rows = [[0.0, *row[1:]] if max(row) == -INF else row for row in rows]
    V = len(rows[0])
    k = data.draw(st.integers(1, V))
    guidance = beta = None
    if data.draw(st.booleans()):
        guidance = torch.tensor(
            data.draw(
                st.lists(
                    st.lists(st.sampled_from([-2.0, 0.0, 0.25, 1.0]), min_size=V, max_size=V),
                    min_size=len(rows),
                    max_size=len(rows),
                )
            )
        )
        beta = torch.tensor(
            data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.7]), min_size=len(rows), max_size=len(rows)))
        )
    with use_backend(backend):
        logprobs, tokens, entropy = topk_logprobs(torch.tensor(rows), k, guidance, beta)
    for b, row in enumerate(rows):
        order, want, want_entropy = naive(
            row,
            k,
            None if guidance is None else guidance[b].tolist(),
            0.0 if beta is None else beta[b].item(),
        )
        assert tokens[b].tolist() == order
        torch.testing.assert_close(logprobs[b], torch.tensor(want), rtol=2e-6, atol=2e-6)
        assert entropy[b].item() == pytest.approx(want_entropy, abs=3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("V", [1, 7, 511, 512, 513, 8192, 8193, 20011])
def test_all_excluded_but_one(backend, V):
    logits = torch.full((2, V), -INF)
    logits[0, V - 1] = -1e30
    logits[1, 0] = 5.0
    with use_backend(backend):
        logprobs, tokens, entropy = topk_logprobs(logits, k=min(3, V))
    assert tokens[:, 0].tolist() == [V - 1, 0]
    assert logprobs[:, 0].tolist() == [0.0, 0.0]
    assert entropy.tolist() == [0.0, 0.0]
    # The rest are excluded tokens, lowest first.
    assert tokens[0, 1:].tolist() == list(range(min(3, V) - 1))
    assert (logprobs[:, 1:] == -INF).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_token_across_segments_and_parts(backend):
    logits = torch.zeros(1, 50000)
    logits[0, [100, 49999, 8192, 30000]] = 1.0
    with use_backend(backend):
        _, tokens, entropy = topk_logprobs(logits, k=6)
    assert tokens[0].tolist() == [100, 8192, 30000, 49999, 0, 1]
    p = logits.double().softmax(-1)
    assert entropy.item() == pytest.approx(-(p * p.log()).sum().item(), rel=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_k_may_be_the_whole_vocabulary(backend):
    logits = torch.randn(2, 3001, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    with use_backend(backend):
        logprobs, tokens, _ = topk_logprobs(logits, k=3001)
    assert torch.equal(tokens, logits.sort(dim=-1, descending=True, stable=True).indices)
    torch.testing.assert_close(
        logprobs.double().exp().sum(-1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_beta_ignores_guidance_even_where_it_is_not_finite(backend):
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(2))
    guidance = torch.stack([torch.full((100,), float("nan")), torch.full((100,), INF), torch.zeros(100)])
    with use_backend(backend):
        plain = topk_logprobs(logits, 5)
        guided = topk_logprobs(logits, 5, guidance, torch.tensor([0.0, -0.0, 1.0]))
    for a, b in zip(plain, guided, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_seen(backend):
    logits = torch.zeros(2, 600)
    logits[0, 599] = float("nan")
    guidance = torch.zeros(2, 600)
    guidance[1, 7] = float("nan")
    with use_backend(backend):
        logprobs, tokens, entropy = topk_logprobs(logits, 2, guidance, torch.ones(2))
    assert tokens.tolist() == [[599, 0], [7, 0]]
    assert logprobs[0].isnan().all()
    assert entropy[0].isnan()
    assert logprobs[1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_do_not_overflow(backend):
    logits = torch.tensor([[3e38, -3e38, 0.0], [1e4, 1e4, 1e4 - 1]])
    with use_backend(backend):
        logprobs, _, entropy = topk_logprobs(logits, 1)
    assert logprobs[0, 0] == 0
    assert entropy[0] == 0
    assert logprobs[1, 0].item() == pytest.approx(-math.log(2 + math.exp(-1)), abs=1e-6)


def test_float64_stays_float64():
    logprobs, _, entropy = topk_logprobs(torch.randn(2, 9, dtype=torch.float64), 3)
    assert logprobs.dtype == entropy.dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(1, 32), 50), r"k=50 exceeds the vocabulary \(V=32\): use k <= 32"),
        ((torch.zeros(1, 32), 0), r"k=0 is not positive: use k >= 1"),
        ((torch.zeros(32), 1), r"logits have shape \[32\]: use \[B, V\]"),
        (
            (torch.zeros(1, 3, dtype=torch.int64), 1),
            "logits has dtype torch.int64: use a floating-point dtype",
        ),
        ((torch.zeros(1, 3), 1, torch.zeros(1, 3)), "guidance and beta come together"),
        (
            (torch.zeros(1, 3), 1, torch.zeros(1, 2), torch.zeros(1)),
            r"guidance has shape \[1, 2\]: use \[B, V\] = \[1, 3\]",
        ),
        (
            (torch.zeros(1, 3), 1, torch.zeros(1, 3), torch.zeros(1).double()),
            "beta has dtype torch.float64: use torch.float32",
        ),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    with pytest.raises(RGTGError, match=message) as error:
        topk_logprobs(*arguments)
    assert "\n" not in str(error.value)
