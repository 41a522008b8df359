"""Fits the score head on the frozen model before the adapters are trained: a Bradley-Terry linear probe.

Adapters that start with a random or zero head first distort the features that the head then has to fit. Fitting the
head first, then fine-tuning, preserves the pretrained features (Kumar et al. 2022, arXiv 2202.10054), which matters
most with few and noisy pairs. The fit is convex, so it needs no learning rate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rgtg_fast.training.losses import Objective

# Prefixes of a pair that the fit uses, evenly spaced: neighboring prefixes have nearly the same features.
POINTS = 12
# Most pairs that the fit uses: enough for a few thousand parameters.
PAIRS = 8192
# Iterations of L-BFGS at most.
_STEPS = 200


def compared_prefixes(chosen: int, rejected: int, objective: Objective) -> tuple[list[int], list[int]]:
    """The prefixes of a pair that the fit compares.

    Args:
        chosen: number of tokens of the chosen answer.
        rejected: number of tokens of the rejected answer.
        objective: its `mode` decides what happens past the shorter answer's end.

    Returns:
        Positions of the prefixes' last tokens in the chosen and in the rejected answer.
    """
    if objective.name in ("full_bt", "farma"):
        return [chosen - 1], [rejected - 1]
    last = (min if objective.mode == "truncate" else max)(chosen, rejected) - 1
    places = sorted({round(last * point / (POINTS - 1)) for point in range(POINTS)})
    return [min(place, chosen - 1) for place in places], [min(place, rejected - 1) for place in places]


def differences(
    hidden: torch.Tensor, offsets: torch.Tensor, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor]:
    """Feature differences between the chosen and the rejected prefixes of a packed batch's pairs.

    Args:
        hidden: [M, E] states of all answer tokens.
        offsets: [2N + 1] int64, where the answers begin, and M.
        objective: decides which prefixes are compared.

    Returns:
        differences: [P, E] float32, the state of a chosen prefix minus that of its rejected one.
        weights: [P] float32, which add up to 1 for every pair.
    """
    bounds = offsets.tolist()
    found, weights = [], []
    for start, middle, end in zip(bounds[:-1:2], bounds[1::2], bounds[2::2], strict=True):
        mine, theirs = compared_prefixes(middle - start, end - middle, objective)
        better = hidden[torch.tensor(mine) + start].float()
        found.append(better - hidden[torch.tensor(theirs) + middle].float())
        weights.append(torch.full((len(mine),), 1 / len(mine)))
    return torch.cat(found), torch.cat(weights)


@torch.enable_grad()
def fit(features: torch.Tensor, weights: torch.Tensor, strength: float) -> torch.Tensor:
    """The head w that minimizes mean softplus(−w·d) + strength / 2 · Σ_j (s_j w_j)², s_j the deviation of feature j.

    Args:
        features: [P, E] float32, the differences d.
        weights: [P] of the terms.
        strength: strength of the penalty; features are standardized, so that it means the same for every model.

    Returns:
        [E] float32.
    """
    spread = features.std(0) + 1e-6
    standard = (features / spread).double()
    share = (weights / weights.sum()).double()
    w = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = (share * F.softplus(-(standard @ w))).sum() + strength / 2 * w.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (w.detach() / spread).float()
