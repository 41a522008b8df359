"""Models whose rope depends on a text's length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models.kinds import Kind, Sources
from tests.models.kinds.tiny import CONTEXT, language_model, llama, llama_reward, reward_model, save

# Tokens up to which the short factors are used: fewer than a prompt has.
ORIGINAL = 16
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 5.0, 0.3, 9.0],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


def _phi3() -> dict[str, Any]:
    # A copy for each model: transformers adds to the dictionary that it is given.
    return {"original_max_position_embeddings": ORIGINAL, "rope_parameters": dict(LONGROPE)}


def _longrope(folder: Path) -> Sources:
    return Sources(save(language_model("phi3", **_phi3()), folder / "lm"), llama_reward(folder))


def _longrope_reward(folder: Path) -> Sources:
    return Sources(llama(folder), save(reward_model("phi3", **_phi3()), folder / "rm"))


def _dynamic(folder: Path) -> Sources:
    lm = save(language_model("llama", rope_parameters=dict(DYNAMIC)), folder / "lm")
    return Sources(lm, llama_reward(folder), ("--max-length", str(2 * CONTEXT)))


KINDS = [
    Kind(
        "Phi-3 (longrope) beyond its original context",
        "language model",
        _longrope,
        served="each row by the frequencies of its own length; computed again once when it crosses",
    ),
    Kind(
        "Phi-3 (longrope) beyond its original context",
        "reward model",
        _longrope_reward,
        served="each row by the frequencies of its own length; computed again once when it crosses",
    ),
    Kind(
        "dynamic rope beyond its context",
        "language model",
        _dynamic,
        refused="beyond its context every further token changes all frequencies of its dynamic rope",
    ),
]
