"""Checks at load time that a model's cached forward equals its own uncached one."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.attention import own_attention
from rgtg_fast.models.heads import Head
from rgtg_fast.models.model_state import lock_of
from rgtg_fast.models.quantized import quantization
from rgtg_fast.models.support import TESTED_FAMILIES, beyond, exceeded_window, original_length
from rgtg_fast.models.tensor_parallel import whole_weight

if TYPE_CHECKING:
    from rgtg_fast.models.runner import ModelRunner

# Keyword arguments of every forward of a trunk, which override its config.
OUTPUTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}

# Largest difference, relative to their norm, between states of two correct forwards. In half precision the bound is
# coarse: a deep model's rounding is as large as the effect of a small mistake, and only a wider dtype separates them.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
# The same for half-precision weights computed in float32.
_WIDENED = 2e-3
# Rounding may route a token to other experts, which changes its states by as much as their weights: in half precision
# a tighter bound is not possible, and the comparison in a wider dtype decides.
_ROUTED = 0.5
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_HALF = (torch.float16, torch.bfloat16)
# The head gets the same states in both forwards, so that only its own rounding differs.
_HEAD = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Two correct forwards of one model have errors of similar size against the same forward in a wider dtype.
_SIMILAR = 4.0
# Smallest difference that short windows must make in a model's own states, larger than what a comparison may miss.
_VISIBLE = 2 * _WIDENED
# An output far beyond the caps that models put on logits.
_LARGE = 1000.0
# Longest text tried beyond a model's original context.
_LONGEST_PROBE = 256
_SCALES = ("softcap", "soft_cap", "logit_scale", "logits_scal", "output_multiplier", "mup_width_multiplier")


def _within_short_texts(check: Callable[..., None]) -> Callable[..., None]:
    """A check of a runner in which a longrope changes its frequencies within a short text, where it does so later."""

    @functools.wraps(check)
    def checked(runner: ModelRunner, *args: Any) -> None:
        rope = runner.rope
        if rope is None or rope.original + 2 <= _LONGEST_PROBE:
            return check(runner, *args)
        with rope.shortened(4):
            return check(runner, *args)

    return checked


@torch.inference_mode()
@_within_short_texts
def verify(runner: ModelRunner) -> None:
    """Compares cached steps and the head with the model's own uncached forward and attention, once at load time.

    A computation of a family beyond its blocks (scaled or capped logits, an unknown kind of attention) would otherwise
    go unnoticed and change every result. In half precision the same comparison in float32 tells a difference from
    rounding. Where the model has sliding windows that are shorter than a row, `runner.windows` is set.

    Args:
        runner: the model with its cache, which is empty afterwards.

    Raises:
        RGTGError: they differ by more than rounding, or the windows cannot be compared.
    """
    ids, name = probe(runner), type(runner.model).__name__
    window = exceeded_window(runner.model.config.get_text_config(), runner.limit)
    _check(runner, ids if window is None else ids[: window.tokens])
    if window is None:
        return
    runner.windows = True
    runner.cache = runner.new_cache(runner.dtype)
    if not _windows_agree(runner, ids):
        way_out = f"max_length={window.tokens} works"
        raise RGTGError(
            f"{name} cannot be served: {beyond(window, runner.limit, way_out)}, and its windows could not be compared "
            "with its own forward"
        )


def _check(runner: ModelRunner, ids: list[int]) -> None:
    name = type(runner.model).__name__
    with own_attention(runner.model):
        own = _check_head(runner, ids)
    error = _states_error(runner, ids, own, 0)
    if error is not None:
        method = quantization(runner.model)
        way_out = f"use a tested family ({TESTED_FAMILIES})"
        if method is not None:
            # Rounded to 8 bits with what else is in the batch, activations differ in a cached forward.
            way_out = f"{method} may quantize its activations too: quantize the weights alone (such as 4-bit)"
        raise RGTGError(
            f"{name} cannot be served: its cached forward differs from its own by {error:.1%}, more than "
            f"{runner.dtype} rounds; {way_out}"
        )


@_within_short_texts
def verify_variant(runner: ModelRunner, variant: int, name: str) -> None:
    """Compares cached and uncached states of the rows that run under an attached adapter.

    Args:
        runner: the model with its cache, which is empty afterwards.
        variant: index of the adapter's rows.
        name: name of the adapter.

    Raises:
        RGTGError: they differ by more than rounding.
    """
    ids = probe(runner)
    with lock_of(runner.model), own_attention(runner.model):
        own = runner.hidden_uncached(ids, variant)
    error = _states_error(runner, ids, own, variant)
    if error is not None:
        raise RGTGError(
            f"{name} cannot share the forward of {type(runner.model).__name__}: cached and uncached differ by "
            f"{error:.1%}, more than {runner.dtype} rounds; use share_trunk=False"
        )


def probe(runner: ModelRunner) -> list[int]:
    """A few token ids of the model's vocabulary, enough to exceed a short original context."""
    config: Any = runner.model.config.get_text_config()
    original = original_length(config)
    length = 6 if original is None or original + 2 > _LONGEST_PROBE else max(6, original + 2)
    # No padding token: a reward model's own forward would score the token before it. The runner's limit is kept.
    pad, count = getattr(config, "pad_token_id", None), runner.embeddings
    numbers = ((3 + 7 * index) % count for index in range(min(length, runner.limit)))
    return [number if number != pad else (number + 1) % count for number in numbers]


# ---- sliding windows -------------------------------------------------------------------------------------------------


def _windows_agree(runner: ModelRunner, ids: list[int]) -> bool:
    """Whether cached steps attend the windows of the model's own forward.

    A window is usually longer than any text that can be tried at load time. For the comparison all windows are a few
    tokens long: in the configs, from which the model's own masks are made, and in the modules, which pass them to the
    attention function.
    """
    kept = [
        (holder, window)
        for holder in _configs_and_modules(runner.model)
        if isinstance(window := getattr(holder, "sliding_window", None), int) and window
    ]
    try:
        whole = _uncached_with_windows(runner, ids, kept, len(ids))
        own = _uncached_with_windows(runner, ids, kept, max(1, len(ids) // 3))
        # Where short windows leave the model's own forward as it is, an agreement would show nothing.
        visible = len({window for _, window in kept}) == 1 and _difference(own, whole) > _VISIBLE
        return visible and _states_error(runner, ids, own, 0) is None
    finally:
        for holder, window in kept:
            holder.sliding_window = window
        runner.layers.refresh()


def _configs_and_modules(model: PreTrainedModel) -> list[Any]:
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    texts = [config.get_text_config() for config in configs]
    return list({id(holder): holder for holder in (*configs, *texts, *model.modules())}.values())


def _uncached_with_windows(
    runner: ModelRunner, ids: list[int], holders: list[tuple[Any, int]], size: int
) -> torch.Tensor:
    """States [T, E] of the model's own forward with windows of `size` tokens, which are left set."""
    for holder, _ in holders:
        holder.sliding_window = size
    runner.layers.refresh()
    with own_attention(runner.model):
        return runner.hidden_uncached(ids)


# ---- states ----------------------------------------------------------------------------------------------------------


def _states_error(runner: ModelRunner, ids: list[int], own: torch.Tensor, variant: int) -> float | None:
    """The difference between the cached steps' states and `own` [T, E] if it exceeds rounding, else None."""
    dtype = runner.dtype
    found = _cached_states(runner, ids)[variant]
    error = _difference(found, own[-len(found) :])
    if dtype not in _HALF:
        # A GPU may multiply float32 matrices in TF32.
        rounding = _ROUNDING[dtype] * (10 if runner.device.type == "cuda" else 1)
        return None if error <= rounding else error
    routed = any(getattr(runner.model.config.get_text_config(), name, None) for name in _EXPERTS)
    if not error <= (_ROUTED if routed else _ROUNDING[dtype]):
        return error
    try:
        return _float32_error(runner, ids, variant, found, own[-len(found) :])
    except Exception:  # noqa: BLE001 - kernels of quantized weights may lack float32, and raise anything
        return None


def _float32_error(
    runner: ModelRunner, ids: list[int], variant: int, found: torch.Tensor, own: torch.Tensor
) -> float | None:
    """As `_states_error`, for states [n, E] in half precision: compares with float32 and the same weights."""
    exact = _uncached_in_float32(runner, ids, variant)[-len(found) :]
    if runner.engine == "native":
        error = _difference(found, exact)
        typical = max(_difference(own, exact), torch.finfo(runner.dtype).eps / 2)
        return None if error <= _SIMILAR * typical else error
    with _in_float32(runner):
        error = _difference(_cached_states(runner, ids)[variant], exact)
    return None if error <= _WIDENED else error


def _difference(found: torch.Tensor, own: torch.Tensor) -> float:
    found, own = found.double(), own.double()
    return float((found - own).norm() / own.norm().clamp_min(torch.finfo(torch.float64).tiny))


def _cached_states(runner: ModelRunner, ids: list[int]) -> torch.Tensor:
    """States [variants, n, E] of the last n tokens, which are decoded after a prefill of the others."""
    # All tokens are kept: the windows that are compared may be longer than the model's own.
    runner.reserve(1, len(ids), undo=len(ids))
    first = max(len(ids) - 3, 0)
    runner.prefill(0, ids[:first])
    states = []
    for token in ids[first:]:
        runner.step(torch.tensor([[token]], device=runner.device))
        states.append(runner.stepped[0])
        runner.commit(torch.zeros(1, dtype=torch.int64, device=runner.device))
    runner.reserve(1, len(ids), undo=len(ids))
    return torch.cat(states, 1)


def _uncached_in_float32(runner: ModelRunner, ids: list[int], variant: int) -> torch.Tensor:
    """States [T, E] of the model's own forward and attention, in float32 with the same weights."""
    with own_attention(runner.model), _Float32():
        return runner.hidden_uncached(ids, variant)


# ---- the head --------------------------------------------------------------------------------------------------------


def _check_head(runner: ModelRunner, ids: list[int]) -> torch.Tensor:
    """Compares the head with the model's own logits; returns the trunk's states [T, E] in the model's own forward.

    The comparison is repeated with large states, since only large logits are changed by a cap.
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
    # The longrope of the recorded forward is that of the whole text in every prefix.
    return own if runner.rope is None else runner.hidden_uncached(ids)


def _own_logits(runner: ModelRunner, ids: list[int]) -> torch.Tensor:
    """The last row [1, V] of the logits of the model's own forward."""
    text = torch.tensor([ids], device=runner.device)
    logits = runner.model(input_ids=text, use_cache=False, return_dict=True).logits
    return logits.reshape(-1, runner.head.out_features)[-1:].double()


def _check_logits(runner: ModelRunner, state: torch.Tensor, own: torch.Tensor) -> None:
    """Refuses a model whose own logits [1, V] are not its head's output for the state [1, E]."""
    head = runner.head
    found = runner.logits(state.float() if runner.engine == "native" else state).double()
    # A single reward may be near 0 by chance: the error is relative to the head's typical output for such a state.
    typical = state.double().norm()
    for layer in [head] if isinstance(head, nn.Linear) else head.linears():
        typical = whole_weight(layer).double().norm() * typical / layer.in_features**0.5
    size = own.norm() if own.shape[-1] > 1 else torch.maximum(own.norm(), typical)
    error = float((found - own).norm() / size.clamp_min(torch.finfo(torch.float64).tiny))
    if error <= _HEAD[runner.dtype]:
        return
    if not (found.isfinite().all() and own.isfinite().all()):
        raise RGTGError(
            f"{type(runner.model).__name__} cannot be served: its logits are NaN or infinite; check the weights of its "
            "trunk and its head, and the dtype (float16 overflows: try bfloat16 or float32)"
        )
    config = runner.model.config.get_text_config().to_dict()
    named = [
        f"{key}={value}"
        for key, value in config.items()
        if any(scale in key for scale in _SCALES) and value not in (None, 1)
    ]
    raise RGTGError(
        f"{type(runner.model).__name__} cannot be served: its logits differ from its head's output by {error:.1%}"
        f" ({', '.join(named) or 'it scales, caps or adds to them'}); use a tested family ({TESTED_FAMILIES})"
    )


def _large_state(head: Head) -> torch.Tensor:
    """A state [E] for which an output of the head's first layer is `_LARGE`, or as large as half precision can hold."""
    weight = whole_weight(head if isinstance(head, nn.Linear) else head.linears()[0]).double()
    row = weight[weight.norm(dim=1).argmax()]
    square = row.square().sum()
    if not square > 0:
        return torch.zeros_like(row)
    state = row * (_LARGE / square)
    return state * min(1.0, _LARGE / float(state.abs().max()))


class _Recorder:
    """A trunk's output, and states [T, E] to return in place of running it."""

    output: Any = None
    replacement: torch.Tensor | None = None


@contextmanager
def _recorded(trunk: nn.Module) -> Iterator[_Recorder]:
    """Records a trunk's output within the block, or replaces it once the recorder has a replacement."""
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
    """Computes in float32: operations read half-precision tensors, weights included, as float32.

    One tensor at a time is converted, so that the model need not fit the memory in float32.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, schema = kwargs or {}, func._schema
        written = [
            arg
            for arg, spec in zip(args, schema.arguments, strict=False)
            if spec.alias_info is not None and spec.alias_info.is_write and isinstance(arg, torch.Tensor)
        ]
        # Views and rows of an embedding are converted where they are read; a cast may be a view.
        cast = any(isinstance(x, torch.dtype) for x in (*args, *kwargs.values()))
        view = not written and not cast and any(result.alias_info is not None for result in schema.returns)
        if view or func is torch.ops.aten.embedding.default:
            return func(*args, **kwargs)
        # A tensor that is written to keeps its dtype, and the other operands must have the same.
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
    """Runs the model in float32, with a float32 cache."""
    cache = runner.cache
    runner.cache = runner.new_cache(torch.float32)
    try:
        with _Float32():
            yield
    finally:
        runner.cache = cache
        runner.reserve(0, 0)
