"""The specification of partial_bt_loss in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def reference(
    rewards: torch.Tensor,
    offsets: torch.Tensor,
    mode: str,
    weight: str,
    normalizer: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    # What is not read must not be differentiated either: the gradient is computed here, by its formula.
    rewards = rewards.detach().to(dtype)  # [M]
    ends = offsets.tolist()
    loss, gradient = rewards.new_zeros(()), torch.zeros_like(rewards)
    count = 0
    for pair in range(len(ends) // 2):
        chosen, rejected = slice(*ends[2 * pair : 2 * pair + 2]), slice(*ends[2 * pair + 1 : 2 * pair + 3])
        n_chosen, n_rejected = chosen.stop - chosen.start, rejected.stop - rejected.start
        n = min(n_chosen, n_rejected) if mode == "truncate" else max(n_chosen, n_rejected)
        # The last reward of the shorter answer stands for all that would come after it.
        term = torch.arange(n, device=rewards.device)
        i, j = term.clamp(max=n_chosen - 1), term.clamp(max=n_rejected - 1)
        margin = rewards[chosen][i] - rewards[rejected][j]
        share = 1 / n if weight == "pair" else 1.0
        loss -= share * F.logsigmoid(margin).sum()
        slope = -share * torch.sigmoid(-margin)
        gradient[chosen].index_add_(0, i, slope)
        gradient[rejected].index_add_(0, j, -slope)
        count += 1 if weight == "pair" else n
    total = count if normalizer is None else normalizer.to(dtype)
    return loss / total, gradient / total
