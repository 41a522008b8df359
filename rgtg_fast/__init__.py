"""Reward-guided text generation: align a frozen language model while it decodes, fast and exactly."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rgtg_fast.config import BestOfN as BestOfN
    from rgtg_fast.config import Blocks as Blocks
    from rgtg_fast.config import Guidance as Guidance
    from rgtg_fast.config import Segments as Segments
    from rgtg_fast.decoder import RewardGuidedDecoder as RewardGuidedDecoder
    from rgtg_fast.engine.outputs import Candidate as Candidate
    from rgtg_fast.engine.outputs import GeneratedRow as GeneratedRow
    from rgtg_fast.engine.outputs import GenerationResult as GenerationResult
    from rgtg_fast.engine.outputs import Stats as Stats
    from rgtg_fast.engine.outputs import Step as Step
    from rgtg_fast.engine.outputs import StreamChunk as StreamChunk
    from rgtg_fast.errors import RewardNaNError as RewardNaNError
    from rgtg_fast.errors import RGTGError as RGTGError
    from rgtg_fast.integrations.logits_processor import (
        RewardGuidedLogitsProcessor as RewardGuidedLogitsProcessor,
    )
    from rgtg_fast.integrations.transformers import custom_generate as custom_generate
    from rgtg_fast.rewards.base import Prefix as Prefix
    from rgtg_fast.rewards.base import Reward as Reward
    from rgtg_fast.rewards.contrastive import ContrastiveReward as ContrastiveReward
    from rgtg_fast.rewards.function import FunctionReward as FunctionReward
    from rgtg_fast.rewards.mixture import MixtureReward as MixtureReward
    from rgtg_fast.rewards.parse import named_guide as named_guide
    from rgtg_fast.rewards.sequence import RADReward as RADReward
    from rgtg_fast.rewards.sequence import SequenceReward as SequenceReward
    from rgtg_fast.rewards.text import TextReward as TextReward
    from rgtg_fast.rewards.vocabulary import AutoregressiveReward as AutoregressiveReward
    from rgtg_fast.rewards.vocabulary import LogRatioReward as LogRatioReward
    from rgtg_fast.rewards.vocabulary import VocabularyReward as VocabularyReward
    from rgtg_fast.scorer import RequestScorer as RequestScorer

__version__ = "0.1.0"

# Public name -> the module that holds it; imported at its first use, so that `import rgtg_fast` takes no time.
_HOMES = {
    "BestOfN": "config",
    "Blocks": "config",
    "Segments": "config",
    "Guidance": "config",
    "RewardGuidedDecoder": "decoder",
    "Candidate": "engine.outputs",
    "GeneratedRow": "engine.outputs",
    "GenerationResult": "engine.outputs",
    "StreamChunk": "engine.outputs",
    "Stats": "engine.outputs",
    "Step": "engine.outputs",
    "RGTGError": "errors",
    "RewardNaNError": "errors",
    "RewardGuidedLogitsProcessor": "integrations.logits_processor",
    "custom_generate": "integrations.transformers",
    "AutoregressiveReward": "rewards.vocabulary",
    "Prefix": "rewards.base",
    "Reward": "rewards.base",
    "RequestScorer": "scorer",
    "ContrastiveReward": "rewards.contrastive",
    "FunctionReward": "rewards.function",
    "LogRatioReward": "rewards.vocabulary",
    "MixtureReward": "rewards.mixture",
    "named_guide": "rewards.parse",
    "RADReward": "rewards.sequence",
    "SequenceReward": "rewards.sequence",
    "TextReward": "rewards.text",
    "VocabularyReward": "rewards.vocabulary",
}

__all__ = [
    "AutoregressiveReward",
    "BestOfN",
    "Blocks",
    "Candidate",
    "ContrastiveReward",
    "FunctionReward",
    "GeneratedRow",
    "GenerationResult",
    "Guidance",
    "LogRatioReward",
    "MixtureReward",
    "Prefix",
    "RADReward",
    "RGTGError",
    "RequestScorer",
    "Reward",
    "RewardGuidedDecoder",
    "RewardGuidedLogitsProcessor",
    "RewardNaNError",
    "Segments",
    "SequenceReward",
    "Stats",
    "Step",
    "StreamChunk",
    "TextReward",
    "VocabularyReward",
    "__version__",
    "custom_generate",
    "named_guide",
]


# Old name -> new name.
_RENAMED = {"Piece": "StreamChunk"}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        from rgtg_fast.deprecation import warn_renamed

        warn_renamed(f"rgtg_fast.{name}", new := _RENAMED[name])
        name = new
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'rgtg_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"rgtg_fast.{home}"), name)


def __dir__() -> list[str]:
    return __all__
