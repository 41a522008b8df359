"""The fused operations: six to decode (topk_logprobs ... advance), partial_bt_loss to train.

Each is one torch.library op with a reference in plain PyTorch, a C++ kernel for the CPU and Triton kernels
for CUDA; see README.md for the legend of shapes.
"""

from ._registry import KernelSpec, OpSpec, Tolerance, backend_of, specs, use_backend
from .advance import advance
from .commit import commit
from .partial_bt_loss import partial_bt_loss, partial_bt_terms
from .resample import resample
from .reward_tail import reward_tail
from .topk_logprobs import topk_logprobs
from .tree_attention import tree_attention

__all__ = [
    "KernelSpec",
    "OpSpec",
    "Tolerance",
    "advance",
    "backend_of",
    "commit",
    "partial_bt_loss",
    "partial_bt_terms",
    "resample",
    "reward_tail",
    "specs",
    "topk_logprobs",
    "tree_attention",
    "use_backend",
]
