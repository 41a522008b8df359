"""Lengths up to which a model's attention and positions are those that a prefix cache computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

# Rope types whose frequencies are a function of the position alone; the others look at the longest row of a batch.
STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn", "proportional"})
# Rope types that are static up to a length.
_ORIGINAL_ROPE = frozenset({"dynamic", "longrope"})
# Kinds of layers that attend the whole prefix, and those that attend the end of it.
_WHOLE = frozenset({"full_attention", "attention"})
_WINDOWED = frozenset({"sliding_attention", "chunked_attention"})


class Limit(NamedTuple):
    """Tokens of a text up to which a model is served, and what it does beyond, as in "it ..."."""

    tokens: int
    beyond: str


def limits(config: Any) -> Iterator[Limit]:
    """Every length at which a text model begins to do what a prefix cache does not compute."""
    window = _window(config)
    if window is not None:
        yield Limit(window, f"attends a sliding window of {window} tokens")
    for rope in _ropes(config):
        kind = rope_type(rope)
        if kind in _ORIGINAL_ROPE:
            tokens = int(config.max_position_embeddings if kind == "dynamic" else _original(config, rope))
            yield Limit(
                tokens, f"chooses the frequencies of its {kind} rope by the length beyond {tokens} tokens"
            )
    if getattr(config, "attn_temperature_tuning", False):
        tokens = int(config.floor_scale) - 1
        yield Limit(tokens, f"scales its attention by the position beyond {tokens} tokens")


def unknown_kind(config: Any) -> str | None:
    """What a text model's config says that cannot be judged, in words; None where all is known."""
    kinds = set(getattr(config, "layer_types", None) or []) - _WHOLE - _WINDOWED
    if kinds:
        return f"its layers of the kind {min(kinds)!r} are unknown"
    ropes = {str(rope_type(rope)) for rope in _ropes(config)} - STATIC_ROPE - _ORIGINAL_ROPE
    return f"its rope type {min(ropes)!r} is unknown" if ropes else None


def rope_type(rope: dict[str, Any]) -> str:
    """The type that rope parameters name."""
    return rope.get("rope_type") or rope.get("type") or "default"


def original_length(config: Any) -> int | None:
    """The context that a text model had before its rope was scaled, None where the config names none."""
    lengths = [_original(config, rope) for rope in _ropes(config)]
    return max((int(length) for length in lengths if length), default=None)


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


def _window(config: Any) -> int | None:
    kinds = set(getattr(config, "layer_types", None) or [])
    if (kinds and not kinds & _WINDOWED) or (
        not kinds and getattr(config, "use_sliding_window", True) is False
    ):
        return None
    names = ("sliding_window", "attention_chunk_size") if kinds else ("sliding_window",)
    return min((int(size) for name in names if (size := getattr(config, name, None))), default=None)
