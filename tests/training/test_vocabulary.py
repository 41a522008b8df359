"""FaRMA's scores and GenARM's log-probabilities on packed batches, against one forward an answer and plain formulas."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rgtg_fast.errors import RGTGError
from rgtg_fast.training import vocabulary
from rgtg_fast.training.losses import Objective
from rgtg_fast.training.model import use_packed_forward
from rgtg_fast.training.packing import answer_positions, collate, pack
from rgtg_fast.training.vocabulary import (
    chunked_logprobs,
    load_causal,
    token_logprobs,
    token_scores,
    token_scores_and_best,
)
from tests.conftest import make_lm, make_tokenizer
from tests.training.support import save_lm, tokenized

PAIRS = tokenized(7, seed=2)


@pytest.fixture(autouse=True)
def norms_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' norm computes in float32 whatever the model's dtype, which would end the comparison at 1e-7."""

    def forward(self: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def whole_logits(model: Any) -> list[tuple[torch.Tensor, list[int]]]:
    """Of each answer, the logits [n, V] before its tokens from a forward of its own, and the tokens."""
    found = []
    for pair in PAIRS:
        for answer in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.tensor([[*pair.prompt_ids, *answer]])
            logits = model(ids).logits[0, len(pair.prompt_ids) - 1 : -1]
            found.append((logits, answer))
    return found


def naive_loss(model: Any, objective: Objective, constraint: bool) -> torch.Tensor:
    """The formulas of the papers, one answer after the other."""
    values, terms = [], []
    for logits, answer in whole_logits(model):
        n = len(answer)
        if objective.name == "genarm":
            logprobs = logits.log_softmax(-1)
            values.append(sum(logprobs[t, answer[t]] for t in range(n)) * objective.beta_r)
            continue
        values.append(logits[n - 1, answer[n - 1]])
        errors = []
        for t in range(n - 1):
            best = logits[t + 1].max()
            if objective.stop_gradient:
                best = best.detach()
            errors.append((logits[t, answer[t]] - best) ** 2)
        terms.append(errors)
    if constraint:
        if objective.weight == "prefix":
            return sum(e for errors in terms for e in errors) / sum(map(len, terms))
        return sum(sum(errors) / len(errors) for errors in terms) / len(terms)
    losses = [
        -torch.nn.functional.logsigmoid(chosen - rejected)
        for chosen, rejected in zip(values[::2], values[1::2], strict=True)
    ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("settings", "constraint"),
    [
        ({"name": "genarm"}, False),
        ({"name": "genarm", "beta_r": 0.7}, False),
        ({"name": "farma"}, False),
        ({"name": "farma"}, True),
        ({"name": "farma", "weight": "pair"}, True),
        ({"name": "farma", "stop_gradient": True}, True),
    ],
    ids=str,
)
def test_loss_and_gradient_are_those_of_the_formula(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], constraint: bool, tied: bool
) -> None:
    # Seven tokens at a time, so that the chunks do not come out even.
    monkeypatch.setattr(vocabulary, "_LOGITS", 7 * 64)
    objective = Objective(**settings)
    model: Any = make_lm(dtype=torch.float64, tie_word_embeddings=tied)
    want = naive_loss(model, objective, constraint)
    want_gradient = torch.autograd.grad(want, list(model.parameters()))
    use_packed_forward(model)
    rows = pack(PAIRS, 48)
    assert len(rows) < len(PAIRS)
    # The loss is a mean over pairs, whose order does not matter.
    batch = collate(PAIRS, rows, 0, length=48)
    offsets = answer_positions(batch)[2]
    if constraint:
        rewards, best = model(batch=batch, read=token_scores_and_best).logits
        loss = objective.loss(rewards, offsets, best=best)
    else:
        read = token_logprobs if objective.name == "genarm" else token_scores
        loss = objective.loss(model(batch=batch, read=read).logits, offsets)
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    for (name, _), ours, theirs in zip(model.named_parameters(), gradient, want_gradient, strict=True):
        assert theirs.abs().max() > 0, name
        assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-10, name


def test_the_two_constraints_differ() -> None:
    """The test above would pass if nobody looked at stop_gradient."""
    model: Any = make_lm(dtype=torch.float64)
    gradients = []
    for stop in (False, True):
        loss = naive_loss(model, Objective("farma", stop_gradient=stop), True)
        gradients.append(torch.autograd.grad(loss, [model.lm_head.weight])[0])
    assert (gradients[0] - gradients[1]).norm() > 0.01 * gradients[0].norm()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_chunked_logprobs_have_the_gradient_of_a_log_softmax(
    monkeypatch: pytest.MonkeyPatch, frozen: bool, biased: bool
) -> None:
    monkeypatch.setattr(vocabulary, "_LOGITS", 3 * 11)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(8, 5, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(11, 5, dtype=torch.float64, generator=generator).requires_grad_(not frozen)
    bias = torch.randn(11, dtype=torch.float64, generator=generator).requires_grad_(not frozen)
    tokens = torch.randint(11, (8,), generator=generator)
    given = (states, weight, bias if biased else None)
    logits = torch.nn.functional.linear(*given)
    expected = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(chunked_logprobs(*given, tokens), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *x: chunked_logprobs(*x, tokens), given)


def test_no_tensor_of_tokens_times_vocabulary_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(vocabulary, "_LOGITS", 4 * 97)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                # The head itself, transposed, is [6, 97].
                if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (97,) and len(tensor) != 6:
                    largest = max(largest, tensor.numel())
            return out

    states = torch.randn(40, 6, requires_grad=True)
    weight, tokens = torch.randn(97, 6), torch.randint(97, (40,))
    with Watch():
        chunked_logprobs(states, weight, None, tokens).sum().backward()
        vocabulary._best(states, weight, None, torch.float32)
    assert largest == 4 * 97


def test_bfloat16_products_are_as_near_as_bfloat16_is() -> None:
    torch.manual_seed(0)
    states, weight = torch.randn(30, 32), torch.randn(97, 32)
    tokens = torch.randint(97, (30,))
    exact = chunked_logprobs(states.double(), weight.double(), None, tokens)
    near = chunked_logprobs(states, weight, None, tokens, torch.bfloat16)
    assert near.dtype == torch.float32
    assert (near.double() - exact).norm() / exact.norm() < 0.01


def test_ligers_loss_gives_the_same_where_its_gradient_ignores_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stand-in with liger-kernel's interface: older versions scale all tokens by the first token's gradient."""

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Any, inputs: Any, tokens: Any) -> Any:
            with torch.enable_grad():
                own = inputs.detach().requires_grad_()
                losses = torch.nn.functional.cross_entropy(own @ weight.T, tokens, reduction="none")
                (ctx.slopes,) = torch.autograd.grad(losses.sum(), own)
            return losses.detach()

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return None, ctx.slopes * grad[0], None

    class Loss:
        def __init__(self, reduction: str):
            assert reduction == "none"

        def __call__(self, weight: Any, inputs: Any, tokens: Any, bias: Any = None) -> Any:
            return Fused.apply(weight, inputs, tokens)

    stand_in = types.ModuleType("liger_kernel.transformers")
    vars(stand_in)["LigerFusedLinearCrossEntropyLoss"] = Loss
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stand_in)
    torch.manual_seed(0)
    weight, tokens, scale = torch.randn(11, 5), torch.randint(11, (8,)), torch.randn(8)
    results = []
    for of in (
        lambda x: vocabulary._LigerLogprobs.apply(x, weight, None, tokens),
        lambda x: chunked_logprobs(x, weight, None, tokens),
    ):
        states = torch.randn(8, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        logprobs = of(states)
        (logprobs * scale).sum().backward()
        results.append((logprobs, states.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_new_head_is_zero_and_leaves_the_embeddings_alone(tmp_path: Path, tied: bool) -> None:
    base = save_lm(tmp_path / "lm", tie_word_embeddings=tied)
    model, _ = load_causal(base, new_head=True)
    assert not model.get_parameter("lm_head.weight").any()
    assert torch.equal(
        model.get_parameter("model.embed_tokens.weight"),
        AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight,
    )
    kept, _ = load_causal(base)
    assert torch.equal(
        kept.get_parameter("lm_head.weight"),
        AutoModelForCausalLM.from_pretrained(base).get_output_embeddings().weight,
    )


def test_what_cannot_be_a_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RGTGError, match="nowhere' does not exist: check the path"):
        load_causal(tmp_path / "nowhere")
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=1.0,
        initializer_range=0.4,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "capped")
    make_tokenizer().save_pretrained(tmp_path / "capped")
    with pytest.raises(RGTGError, match="scales or caps its logits"):
        load_causal(tmp_path / "capped")
