"""Which architectures work with a prefix cache, and up to which sequence length, judged by a model's config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.rope import longrope_length
from rgtg_fast.models.tensor_parallel import spread_over

TESTED_FAMILIES = "Llama, Qwen2, Qwen3, Mistral, Gemma 1 to 3, Phi, gpt-oss, GPT-NeoX, OPT, GPT-2"
# Rope types whose frequencies depend on the position only; the others also depend on the longest row of a batch.
STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn", "proportional"})
# Rope types that are static up to a length; `models.rope` computes longrope beyond it.
_STATIC_UP_TO_A_LENGTH = frozenset({"dynamic", "longrope"})
_FULL_ATTENTION = frozenset({"full_attention", "attention"})
_WINDOWED_ATTENTION = frozenset({"sliding_attention", "chunked_attention"})
_RECURRENT_LAYERS = frozenset({"linear_attention", "mamba", "recurrent", "conv"})
_RECURRENT_MODELS = (
    "mamba",
    "rwkv",
    "recurrent",
    "jamba",
    "zamba",
    "bamba",
    "hawk",
    "xlstm",
    "lfm",
    "falcon_h1",
)


class Limit(NamedTuple):
    """A sequence length up to which a prefix cache is exact.

    Attributes:
        tokens: the longest such sequence.
        beyond: what the model does beyond it, to follow "it" in a message.
    """

    tokens: int
    beyond: str


def refusal(model: PreTrainedModel, length: int | None) -> str | None:
    """Why a model cannot work with a prefix cache, or None.

    Args:
        model: the model.
        length: tokens that a row may have, None for the model's whole context.
    """
    reason = unsupported_architecture(model)
    nearest = exceeded_limit(model.config.get_text_config(), length)
    if nearest is None:
        return reason
    way_out = f"max_length={nearest.tokens} works" if reason is None else f"besides, {reason}"
    return beyond(nearest, length, way_out)


def beyond(limit: Limit, length: int | None, way_out: str) -> str:
    """What is wrong with a cache of `length` tokens, None for the whole context, beyond a limit."""
    cache = "its whole context" if length is None else f"{length} tokens"
    return f"it {limit.beyond}, the cache is for {cache} ({way_out})"


def unsupported_architecture(model: PreTrainedModel) -> str | None:
    """Why a model cannot work with a prefix cache of any length, or None."""
    config: Any = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    recurrent = any(name in str(config.model_type) for name in _RECURRENT_MODELS)
    stateful = _layer_types(config) & _RECURRENT_LAYERS
    if recurrent or model._is_stateful or stateful:
        return "it keeps a recurrent state" + (f" in its {min(stateful)!r} layers" if stateful else "")
    if model.base_model is model:
        return "its trunk cannot be told from its head"
    if not model._supports_attention_backend:
        return "its attention cannot be replaced"
    if getattr(config, "kv_lora_rank", None) is not None:
        return "its keys and values are compressed (multi-head latent attention)"
    if _head_sizes_differ(config):
        return "its layers differ in the size of their heads"
    if _context(config) is None:
        return "its config names no length of its context (max_position_embeddings)"
    unknown_layers = _layer_types(config) - _FULL_ATTENTION - _WINDOWED_ATTENTION
    if unknown_layers:
        return f"its layers of the kind {min(unknown_layers)!r} are unknown"
    unknown_ropes = {str(_rope_type(rope)) for rope in _ropes(config)} - STATIC_ROPE - _STATIC_UP_TO_A_LENGTH
    return f"its rope type {min(unknown_ropes)!r} is unknown" if unknown_ropes else None


def exceeded_limit(config: Any, length: int | None) -> Limit | None:
    """The lowest of a text model's limits where a cache of `length` tokens exceeds it, else None."""
    return _exceeded(min(_limits(config), default=None), config, length)


def exceeded_window(config: Any, length: int | None) -> Limit | None:
    """A text model's sliding window where a cache of `length` tokens exceeds it, else None.

    Beyond it a cached forward is exact where `verification` has found that the windows are the model's own.
    """
    window = sliding_window(config)
    limit = None if window is None else Limit(window, f"attends a sliding window of {window} tokens")
    return _exceeded(limit, config, length)


def _exceeded(limit: Limit | None, config: Any, length: int | None) -> Limit | None:
    reach = min((tokens for tokens in (length, _context(config)) if tokens is not None), default=None)
    return None if limit is None or (reach is not None and reach <= limit.tokens) else limit


def _limits(config: Any) -> Iterator[Limit]:
    """Every sequence length beyond which a text model computes something that a prefix cache does not."""
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and "chunked_attention" in _layer_types(config):
        yield Limit(int(chunk), f"attends in chunks of {chunk} tokens")
    for rope in _ropes(config):
        kind = _rope_type(rope)
        if kind in _STATIC_UP_TO_A_LENGTH and longrope_length(config) is None:
            tokens = int(config.max_position_embeddings if kind == "dynamic" else _original(config, rope))
            yield Limit(
                tokens, f"chooses the frequencies of its {kind} rope by the length beyond {tokens} tokens"
            )
    if getattr(config, "attn_temperature_tuning", False):
        tokens = int(config.floor_scale) - 1
        yield Limit(tokens, f"scales its attention by the position beyond {tokens} tokens")


def context_length(model: PreTrainedModel) -> int:
    """Tokens that the model's context holds.

    Raises:
        RGTGError: fewer than 2.
    """
    config: Any = model.config.get_text_config()
    limit = int(config.max_position_embeddings)
    if limit < 2:
        raise RGTGError(
            f"{title(model)} has a context of {limit} tokens by its config.json: restore the right one"
        )
    return limit


def changes_beyond(config: Any, tokens: int) -> bool:
    """Whether a text model's rope changes with every token after these, the end of its context (dynamic scaling)."""
    return tokens == _context(config) and any(_rope_type(rope) == "dynamic" for rope in _ropes(config))


def _rope_type(rope: dict[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def original_length(config: Any) -> int | None:
    """The context that a text model had before its rope was scaled, None where the config names none."""
    lengths = [_original(config, rope) for rope in _ropes(config)]
    return max((int(length) for length in lengths if length), default=None)


def model_name(model: PreTrainedModel) -> str:
    """A model's path or hub id, or its class where it has none."""
    return model.config._name_or_path or type(model).__name__


def title(model: PreTrainedModel) -> str:
    """A model's path or hub id with its class, or the class alone."""
    name = model.config._name_or_path
    return f"{name} ({type(model).__name__})" if name else type(model).__name__


def _context(config: Any) -> int | None:
    context = getattr(config, "max_position_embeddings", None)
    return context if isinstance(context, int) and context > 0 else None


def _head_sizes_differ(config: Any) -> bool:
    # transformers raises where a config has one value for each layer.
    try:
        for name in ("head_dim", "num_key_value_heads"):
            getattr(config, name, None)
    except Exception:  # noqa: BLE001 - the class that transformers raises is private to it
        return True
    return False


def _layer_types(config: Any) -> set[str]:
    return set(getattr(config, "layer_types", None) or [])


def _original(config: Any, rope: dict[str, Any]) -> Any:
    return rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The config's rope parameters: one set, or one for each kind of layer."""
    found = getattr(config, "rope_parameters", None)
    if not isinstance(found, dict):
        return []
    nested = [each for each in found.values() if isinstance(each, dict)]
    return nested or [found]


def cache_geometry(model: PreTrainedModel) -> tuple[int, int, int]:
    """Layers, key heads and width of a head in a model's cache."""
    config: Any = model.config.get_text_config()
    heads = config.num_attention_heads
    return (
        int(config.num_hidden_layers),
        # Of the heads, a process of several has its share.
        int(getattr(config, "num_key_value_heads", None) or heads) // spread_over(model),
        int(getattr(config, "head_dim", None) or config.hidden_size // heads),
    )


def layer_windows(config: Any) -> list[int]:
    """The sliding window of each layer of a text model, 0 for none."""
    window, layers = sliding_window(config) or 0, int(config.num_hidden_layers)
    kinds = list(getattr(config, "layer_types", None) or ["sliding_attention"] * layers)
    return [window if kind == "sliding_attention" else 0 for kind in kinds[:layers]]


def sliding_window(config: Any) -> int | None:
    """Tokens of a text model's sliding window, None where every layer attends the whole prefix."""
    kinds = _layer_types(config)
    if (kinds and "sliding_attention" not in kinds) or (
        not kinds and getattr(config, "use_sliding_window", True) is False
    ):
        return None
    size = getattr(config, "sliding_window", None)
    return int(size) if size else None
