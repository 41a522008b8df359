"""Checks at load time that a model's cached forward computes what the model computes by itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.attention import own_attention
from rgtg_fast.models.limits import original_length

if TYPE_CHECKING:
    from rgtg_fast.models.runner import ModelRunner

# What every forward of a trunk is to return, whatever its config says.
OUTPUTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}

# How far, relative to their norm, states of two correct forwards differ at most. For a half precision the bound is
# coarse: a deep model rounds as much as a small mistake changes, and only a wider dtype tells the two apart.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
# The same of a half precision's weights in float32.
_WIDENED = 2e-3
# A rounding that sends a token to other experts changes its states by as much as these weigh: no half precision is
# better, and only the comparison in a wider dtype can tell.
_ROUTED = 0.5
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_HALF = (torch.float16, torch.bfloat16)
# The head reads the same states on both sides, so that only its own rounding differs.
_HEAD = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Errors of two correct forwards of one model, against the same forward in a wider dtype, are of one size.
_SIMILAR = 4.0
# An output far beyond any cap that is put on logits.
_LARGE = 1000.0
# Texts beyond a model's original context are tried where they are no longer than this.
_LONGEST_PROBE = 256
_SCALES = ("softcap", "soft_cap", "logit_scale", "logits_scal", "output_multiplier", "mup_width_multiplier")


def verify(runner: ModelRunner) -> None:
    """Compares cached steps and the head with the model's own uncached forward under its own attention.

    Raises:
        RGTGError: they differ by more than rounding.
    """
    ids = probe(runner)
    name = type(runner.model).__name__
    with own_attention(runner.model):
        own = _check_head(runner, ids)
    error = _states_error(runner, ids, own, 0)
    if error is not None:
        raise RGTGError(
            f"{name} cannot be served: its cached forward differs from its own by {error:.1%}, more than "
            f"{runner.dtype} rounds; use a tested family (Llama, Qwen2, Qwen3, Mistral, Gemma, Phi, GPT-NeoX, "
            "OPT, GPT-2)"
        )


def verify_variant(runner: ModelRunner, variant: int, name: str) -> None:
    """The same for the states of an attached adapter's rows beside the model's own.

    Args:
        variant: which rows. name: the adapter's.

    Raises:
        RGTGError: they differ by more than rounding.
    """
    ids = probe(runner)
    with own_attention(runner.model):
        own = runner.hidden_uncached(ids, variant)
    error = _states_error(runner, ids, own, variant)
    if error is not None:
        raise RGTGError(
            f"{name} cannot share the forward of {type(runner.model).__name__}: cached and uncached differ by "
            f"{error:.1%}, more than {runner.dtype} rounds; use share_trunk=False"
        )


def probe(runner: ModelRunner) -> list[int]:
    """A few tokens that this model surely knows, and enough to exceed a short original context."""
    config: Any = runner.model.config.get_text_config()
    original = original_length(config)
    length = 6 if original is None or original + 2 > _LONGEST_PROBE else max(6, original + 2)
    # The padding token stays out: a reward model's own forward would score the token before it. A short context, or
    # a window as short, is not exceeded.
    pad, count = getattr(config, "pad_token_id", None), runner.embeddings
    numbers = ((3 + 7 * index) % count for index in range(min(length, runner.limit)))
    return [number if number != pad else (number + 1) % count for number in numbers]


def _states_error(runner: ModelRunner, ids: list[int], own: torch.Tensor, variant: int) -> float | None:
    """How far the cached steps' states lie from `own` [T, E] where that is more than rounding, else None."""
    dtype = runner.dtype
    found = _cached_states(runner, ids)[variant]
    error = _difference(found, own[-len(found) :])
    if dtype not in _HALF:
        # A GPU may compute float32 products in TF32.
        rounding = _ROUNDING[dtype] * (10 if runner.device.type == "cuda" else 1)
        return None if error <= rounding else error
    routed = any(getattr(runner.model.config.get_text_config(), name, None) for name in _EXPERTS)
    if not error <= (_ROUTED if routed else _ROUNDING[dtype]):
        return error
    try:
        return _float32_error(runner, ids, variant, found, own[-len(found) :])
    except Exception:  # noqa: BLE001 - kernels of quantised weights may know no float32, and raise what they like
        return None


def _float32_error(
    runner: ModelRunner, ids: list[int], variant: int, found: torch.Tensor, own: torch.Tensor
) -> float | None:
    """As `_states_error` of states [n, E] in half precision, by what float32 gives for the same weights."""
    exact = _uncached_in_float32(runner, ids, variant)[-len(found) :]
    if runner.engine == "native":
        error = _difference(found, exact)
        usual = max(_difference(own, exact), torch.finfo(runner.dtype).eps / 2)
        return None if error <= _SIMILAR * usual else error
    with _in_float32(runner):
        error = _difference(_cached_states(runner, ids)[variant], exact)
    return None if error <= _WIDENED else error


def _difference(found: torch.Tensor, own: torch.Tensor) -> float:
    found, own = found.double(), own.double()
    return float((found - own).norm() / own.norm().clamp_min(torch.finfo(torch.float64).tiny))


def _cached_states(runner: ModelRunner, ids: list[int]) -> torch.Tensor:
    """States [variants, n, E] of the last n of a few tokens: the first are prefilled, the last decoded."""
    runner.reserve(1, len(ids))
    first = max(len(ids) - 3, 0)
    runner.prefill(0, ids[:first])
    states = []
    for token in ids[first:]:
        runner.step(torch.tensor([[token]], device=runner.device))
        states.append(runner.stepped[0])
        runner.commit(torch.zeros(1, dtype=torch.int64, device=runner.device))
    runner.reserve(1, len(ids))
    return torch.cat(states, 1)


def _uncached_in_float32(runner: ModelRunner, ids: list[int], variant: int) -> torch.Tensor:
    """States [T, E] by the model's own forward and attention, computed in float32 from the same weights."""
    with own_attention(runner.model), _Float32():
        return runner.hidden_uncached(ids, variant)


# ---- the head --------------------------------------------------------------------------------------------------------


def _check_head(runner: ModelRunner, ids: list[int]) -> torch.Tensor:
    """Compares the head with the model's own logits; returns the trunk's states [T, E] in the model's own forward.

    Large states show what small ones hide: a cap on the logits.
    """
    with _recorded(runner.model.base_model) as recorder:
        logits = _own_logits(runner, ids)
        if recorder.output is None:
            own = runner.hidden_uncached(ids)
            _check_logits(runner, own[-1:], logits)
            return own
        own = recorder.output.last_hidden_state[0]
        _check_logits(runner, own[-1:], logits)
        large = own + _large_state(runner.head).to(own.dtype)
        recorder.replacement = large
        _check_logits(runner, large[-1:], _own_logits(runner, ids))
    return own


def _own_logits(runner: ModelRunner, ids: list[int]) -> torch.Tensor:
    """The last row [1, V] of what the model's own forward returns."""
    text = torch.tensor([ids], device=runner.device)
    logits = runner.model(input_ids=text, use_cache=False, return_dict=True).logits
    return logits.reshape(-1, runner.head.out_features)[-1:].double()


def _check_logits(runner: ModelRunner, state: torch.Tensor, own: torch.Tensor) -> None:
    head = runner.head
    found = runner.logits(state.float() if runner.engine == "native" else state).double()
    # A single reward may be near 0 by chance: it is measured by what such a head gives to states as long as this.
    usual = head.weight.double().norm() * state.double().norm() / state.shape[-1] ** 0.5
    size = own.norm() if own.shape[-1] > 1 else torch.maximum(own.norm(), usual)
    error = float((found - own).norm() / size.clamp_min(torch.finfo(torch.float64).tiny))
    if error <= _HEAD[runner.dtype]:
        return
    config = runner.model.config.get_text_config().to_dict()
    named = [
        f"{key}={value}"
        for key, value in config.items()
        if any(scale in key for scale in _SCALES) and value not in (None, 1)
    ]
    raise RGTGError(
        f"{type(runner.model).__name__} cannot be served: its logits differ from its head's output by {error:.1%}"
        f" ({', '.join(named) or 'it scales, caps or adds to them'}); use a tested family (Llama, Qwen2, Qwen3, "
        "Mistral, Gemma, Phi, GPT-NeoX, OPT, GPT-2)"
    )


def _large_state(head: nn.Linear) -> torch.Tensor:
    """A state [E] that one of the head's outputs answers with `_LARGE`, or as much as half precision holds."""
    weight = head.weight.detach().double()
    row = weight[weight.norm(dim=1).argmax()]
    square = row.square().sum()
    if not square > 0:
        return torch.zeros_like(row)
    state = row * (_LARGE / square)
    return state * min(1.0, _LARGE / float(state.abs().max()))


class _Recorder:
    """What a trunk returned, or is to return instead of running: states [T, E]."""

    output: Any = None
    replacement: torch.Tensor | None = None


@contextmanager
def _recorded(trunk: nn.Module) -> Iterator[_Recorder]:
    """Forwards of a trunk within are kept, and replaced once the recorder says by what."""
    recorder, forward, patched = _Recorder(), trunk.forward, vars(trunk).get("forward")

    def record(*args: Any, **kwargs: Any) -> Any:
        if recorder.replacement is not None:
            output = copy.copy(recorder.output)
            output.last_hidden_state = recorder.replacement[None]
            return output
        recorder.output = forward(*args, **{**kwargs, **OUTPUTS})
        return recorder.output

    trunk.forward = record
    try:
        yield recorder
    finally:
        if patched is None:
            del trunk.forward
        else:
            trunk.forward = patched


# ---- float32 ---------------------------------------------------------------------------------------------------------


class _Float32(TorchDispatchMode):
    """Operations within read tensors of half precision, the weights among them, as float32, and make no others.

    One tensor at a time is copied: a model need not fit the memory in float32.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, schema = kwargs or {}, func._schema
        written = [
            arg
            for arg, spec in zip(args, schema.arguments, strict=False)
            if spec.alias_info is not None and spec.alias_info.is_write and isinstance(arg, torch.Tensor)
        ]
        # Rows of an embedding, like a view, are widened where they are read; a cast may be a view.
        cast = any(isinstance(x, torch.dtype) for x in (*args, *kwargs.values()))
        view = not written and not cast and any(result.alias_info is not None for result in schema.returns)
        if view or func is torch.ops.aten.embedding.default:
            return func(*args, **kwargs)
        # What is written keeps its dtype, and the other operands must have the same.
        dtype = written[0].dtype if written else torch.float32

        def widened(x: Any) -> Any:
            if isinstance(x, torch.dtype):
                return torch.float32 if x in _HALF else x
            if not isinstance(x, torch.Tensor) or any(x is each for each in written):
                return x
            if (
                x.dtype not in (_HALF if not written else (*_HALF, torch.float32))
                or not dtype.is_floating_point
            ):
                return x
            return x.to(dtype)

        return func(*pytree.tree_map(widened, args), **pytree.tree_map(widened, kwargs))


@contextmanager
def _in_float32(runner: ModelRunner) -> Iterator[None]:
    """The backbone's forwards run in float32, over a cache of their own."""
    cache = runner.cache
    runner.cache = runner.new_cache(torch.float32)
    try:
        with _Float32():
            yield
    finally:
        runner.cache = cache
        runner.reserve(0, 0)
