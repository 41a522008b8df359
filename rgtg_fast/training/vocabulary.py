"""Reward models with a vocabulary-sized head: FaRMA's scores and GenARM's log-probabilities of answer tokens.

No [tokens, V] tensor is stored: the products with the head run over a few tokens at a time, and the backward pass needs
only [tokens, E] of them.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.pretrained import read_pretrained
from rgtg_fast.models.quantized import refuse_quantized
from rgtg_fast.ops import topk_logprobs
from rgtg_fast.training.packing import PackedBatch, preceding_positions, pretrained

# The name under which adapters save the head, and decoding finds it.
VOCABULARY_HEAD = "lm_head"
# Number of logits computed at a time: 128 MiB in float32.
_LOGITS = 1 << 25
# Relative difference of the logits that rounding explains.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}


def load_causal(
    source: str | os.PathLike[str], dtype: torch.dtype = torch.float32, new_head: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model to make a reward model of, and its tokenizer.

    Args:
        source: folder or hub id.
        dtype: dtype of the weights.
        new_head: replace the vocabulary head by a matrix of zeros that is not tied to the embeddings.

    Raises:
        RGTGError: there is no such model, it has no linear vocabulary head, or it scales or caps its logits.
    """

    def untied(config: Any) -> None:
        if new_head:
            config.tie_word_embeddings = False

    model, tokenizer, _ = read_pretrained(
        AutoModelForCausalLM, source, "language model", dtype, configure=untied, new_head=new_head
    )
    refuse_quantized(model, "be trained")
    _, head = vocabulary_head(model)
    _check_logits(model, head)
    if new_head:
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
    return model, tokenizer


def vocabulary_head(model: nn.Module) -> tuple[str, Any]:
    """The name and the module of a causal language model's head; PEFT's trainable copy where there is one.

    Raises:
        RGTGError: no linear head.
    """
    inner = pretrained(model)
    head: Any = inner.get_output_embeddings()
    name = next((name for name, child in inner.named_children() if child is head), None)
    if name is None or not isinstance(head.weight, torch.Tensor) or head.weight.ndim != 2:
        raise RGTGError(
            f"{type(inner).__name__} has no linear vocabulary head: use a causal language model (Llama, Qwen2, Qwen3, "
            "Mistral, Gemma, Phi, GPT-NeoX, GPT-2)"
        )
    return name, head


@torch.no_grad()
def _check_logits(model: PreTrainedModel, head: Any) -> None:
    """Refuses models that scale or cap their logits, which the products with the head in this module do not."""
    ids = torch.tensor([[0, 1, 2, 3]], device=model.device)
    own = model(ids, use_cache=False).logits.double()
    ours = head(model.base_model(ids, use_cache=False).last_hidden_state).double()
    error = float((own - ours).norm() / own.norm())
    if not error <= _ROUNDING[model.dtype]:
        raise RGTGError(
            f"{type(model).__name__} scales or caps its logits (they differ from its head's by {error:.1%}), which "
            "training on token log-probabilities does not: use another model"
        )


def token_scores(model: PreTrainedModel, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """FaRMA's rewards head(h(x, y_<i))[y_i] of all answer tokens.

    Args:
        hidden: [R, S, E] states of a packed batch after the final norm.

    Returns:
        [M] in the head's dtype, in the order of `answer_positions`.
    """
    states, tokens = _before_tokens(hidden, batch)
    _, head = vocabulary_head(model)
    return _at(states, head.weight, head.bias, tokens)


def token_scores_and_best(model: PreTrainedModel, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """FaRMA's rewards [2, M]: of all answer tokens, and the largest, max_v head(h(x, y_<i))[v], at the same positions.

    The gradient of the maximum goes to the lowest id among the tokens with the largest reward.
    """
    states, tokens = _before_tokens(hidden, batch)
    _, head = vocabulary_head(model)
    best = _best(states.detach(), head.weight.detach(), head.bias, _product_dtype(states))
    return torch.stack(
        [_at(states, head.weight, head.bias, tokens), _at(states, head.weight, head.bias, best)]
    )


def token_logprobs(model: PreTrainedModel, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """GenARM's rewards log π_r(y_i | x, y_<i) of all answer tokens, [M] in at least float32."""
    states, tokens = _before_tokens(hidden, batch)
    _, head = vocabulary_head(model)
    return chunked_logprobs(states, head.weight, head.bias, tokens, _product_dtype(states))


def states_before(model: PreTrainedModel, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """The states [M, E] from which the answer tokens are predicted, the vocabulary head's input."""
    return _before_tokens(hidden, batch)[0]


def _before_tokens(hidden: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The states [M, E] from which the answer tokens are predicted, and the tokens [M]."""
    rows, columns, before = preceding_positions(batch)
    return hidden[rows, before], batch.input_ids[rows, columns]


def _product_dtype(states: torch.Tensor) -> torch.dtype:
    """The dtype of the products with the head: autocast's where it is on."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


def _at(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tokens: torch.Tensor
) -> torch.Tensor:
    """The head's output [M] at one token per state."""
    with torch.autocast(states.device.type, enabled=False):
        scores = (states.to(weight.dtype) * functional.embedding(tokens, weight)).sum(-1)
        return scores if bias is None else scores + bias[tokens]


@torch.no_grad()
def _best(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The token [M] with the largest score at each state, the lowest id of equals."""
    with torch.autocast(states.device.type, enabled=False):
        best = [topk_logprobs(logits, 1)[1] for _, logits in _logits(states, weight.to(dtype), bias)]
    return torch.cat(best).squeeze(-1)


def _logits(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """Yields slices of the states and the head's outputs [C, V] for them, in the weight's dtype."""
    size = max(1, _LOGITS // len(weight))
    for start in range(0, len(states), size):
        part = slice(start, min(start + size, len(states)))
        yield (
            part,
            functional.linear(
                states[part].to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)
            ),
        )


def chunked_logprobs(
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tokens: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """log softmax(states · weightᵀ + bias)[tokens], without the [M, V] logits.

    Args:
        states: [M, E].
        weight: [V, E], the head.
        bias: [V] or None.
        tokens: [M] int64.
        dtype: dtype of the products; None for the states' own. Sums over the vocabulary are in at least float32.

    Returns:
        [M] in at least float32.
    """
    dtype = dtype or states.dtype
    with torch.autocast(states.device.type, enabled=False):
        frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
        if frozen and states.is_cuda and importlib.util.find_spec("liger_kernel") is not None:
            return _LigerLogprobs.apply(states, weight.to(dtype), bias, tokens)
        return _Logprobs.apply(states, weight, bias, tokens, dtype)


class _Logprobs(torch.autograd.Function):
    """Log-probabilities of tokens under a linear head, a few tokens at a time.

    With p the softmax, d log p[y] / d state = weight[y] − Σ_v p_v weight[v]. The forward pass stores this row for each
    token, since the incoming gradient only scales it. Where the head is trained too, the backward pass recomputes the
    logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tokens: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        narrow = weight.to(dtype)
        out = torch.zeros(len(tokens), dtype=wide, device=states.device)
        slopes = None
        if ctx.needs_input_grad[0]:
            slopes = narrow[tokens]
        for part, logits in _logits(states, narrow, bias):
            # The one-pass top-k computes the log-sum-exp too, without a float32 copy of the logits.
            logprob, top, _ = topk_logprobs(logits, 1)
            both = logits.gather(-1, torch.cat([tokens[part, None], top], -1)).to(wide)
            out[part] = both[:, 0] - both[:, 1] + logprob[:, 0]
            if slopes is not None:
                slopes[part] -= logits.softmax(-1) @ narrow
        ctx.dtype = dtype
        ctx.save_for_backward(states, weight, bias, tokens, slopes)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        states, weight, bias, tokens, slopes = ctx.saved_tensors
        of_states = None if slopes is None else (grad[:, None] * slopes).to(states.dtype)
        of_weight = of_bias = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            of_weight = torch.zeros_like(weight)
            of_bias = None if bias is None else torch.zeros_like(bias)
            narrow = weight.to(ctx.dtype)
            for part, logits in _logits(states, narrow, bias):
                errors = logits.softmax(-1, dtype=grad.dtype).neg_()
                errors.scatter_add_(-1, tokens[part, None], torch.ones_like(errors[:, :1]))
                errors *= grad[part, None]
                of_weight += (errors.to(ctx.dtype).T @ states[part].to(ctx.dtype)).to(weight.dtype)
                if of_bias is not None:
                    of_bias += errors.sum(0).to(of_bias.dtype)
        return of_states, of_weight, of_bias, None, None


class _LigerLogprobs(torch.autograd.Function):
    """The same with liger-kernel's fused linear cross-entropy, for a head that is not trained.

    The gradient of the summed losses has each token's own row, which the incoming gradient scales. This is right
    whether or not the installed version supports a gradient per token.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tokens: torch.Tensor,
    ) -> torch.Tensor:
        from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearCrossEntropyLoss,
        )

        loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
        inputs = states.detach().to(weight.dtype).requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad():
            losses = loss(weight.detach(), inputs, tokens, None if bias is None else bias.detach())
        slopes = None
        if ctx.needs_input_grad[0]:
            (slopes,) = torch.autograd.grad(losses, inputs, torch.ones_like(losses))
        ctx.save_for_backward(states, slopes)
        return -losses.detach().float()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        states, slopes = ctx.saved_tensors
        of_states = None if slopes is None else (-grad[:, None] * slopes).to(states.dtype)
        return of_states, None, None, None
