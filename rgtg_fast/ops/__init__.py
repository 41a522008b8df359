"""The fused operations: six to decode (topk_logprobs ... advance), partial_bt_loss to train.

Each is one torch.library op with a reference in plain PyTorch, a C++ kernel for the CPU and Triton kernels
for CUDA; see README.md for the legend of shapes.
"""

from ._registry import KernelSpec, OpSpec, Tolerance, backend_of, specs, use_backend
from .commit import commit
from .finish_step import finish_step
from .partial_bt_loss import partial_bt_loss, partial_bt_terms
from .resample import resample
from .score_and_sample import score_and_sample
from .topk_logprobs import topk_logprobs
from .tree_attention import tree_attention

__all__ = [
    "KernelSpec",
    "OpSpec",
    "Tolerance",
    "backend_of",
    "commit",
    "finish_step",
    "partial_bt_loss",
    "partial_bt_terms",
    "resample",
    "score_and_sample",
    "specs",
    "topk_logprobs",
    "tree_attention",
    "use_backend",
]
