"""The fused ops: six for decoding, four for a model's layers, partial_bt_loss for training.

Each is one torch.library op with a reference in plain PyTorch, Triton kernels for CUDA and, for most, a C++ kernel for
the CPU; README.md has the legend of shapes, docs/ops.md says which of them other programs can rely on.
"""

from typing import Any

from ..deprecation import renamed_keywords, warn_renamed
from ._registry import backend_of, use_backend
from .act_and_mul import act_and_mul
from .add_rms_norm import add_rms_norm
from .commit import commit
from .finish_step import finish_step
from .invariant_linear import invariant_linear
from .partial_bt_loss import partial_bt_loss, partial_bt_terms
from .resample import resample
from .rope_and_store import rope_and_store
from .score_and_sample import score_and_sample
from .topk_logprobs import topk_logprobs
from .tree_attention import tree_attention

__all__ = [
    "act_and_mul",
    "add_rms_norm",
    "backend_of",
    "commit",
    "finish_step",
    "invariant_linear",
    "partial_bt_loss",
    "partial_bt_terms",
    "resample",
    "rope_and_store",
    "score_and_sample",
    "topk_logprobs",
    "tree_attention",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """The ops by their old names."""
    if name == "advance":
        warn_renamed("ops.advance", "ops.finish_step")
        return renamed_keywords(drawn="chosen_logprob")(finish_step)
    if name == "reward_tail":
        warn_renamed("ops.reward_tail", "ops.score_and_sample")
        return score_and_sample
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
