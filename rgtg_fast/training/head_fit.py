"""The score head fitted on the frozen model before anything else is trained: a Bradley-Terry probe.

Adapters that start under a random or zero head first distort the features that the head then has to fit. Fitting the
head first, then fine-tuning, keeps what the model knows (Kumar et al. 2022, arXiv 2202.10054); with few and noisy pairs
that decides what is learned. The fit is convex, so it needs no learning rate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rgtg_fast.training.losses import Objective

# Prefixes of a pair that the fit looks at, evenly spread: neighbours say nearly the same.
POINTS = 12
# Pairs that the fit looks at, at most: a head of a few thousand numbers needs no more.
PAIRS = 8192
_STEPS = 200


def compared_prefixes(chosen: int, rejected: int, objective: Objective) -> tuple[list[int], list[int]]:
    """Which prefixes of a pair the fit compares: indices into the chosen and into the rejected answer.

    Args:
        chosen, rejected: tokens of the answers.
        objective: its `mode` says what happens past the shorter answer's end.
    """
    if objective.name in ("full_bt", "farma"):
        return [chosen - 1], [rejected - 1]
    last = (min if objective.mode == "truncate" else max)(chosen, rejected) - 1
    places = sorted({round(last * point / (POINTS - 1)) for point in range(POINTS)})
    return [min(place, chosen - 1) for place in places], [min(place, rejected - 1) for place in places]


def differences(
    hidden: torch.Tensor, offsets: torch.Tensor, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor]:
    """What separates the answers of a packed batch's pairs, in the features that the head reads.

    Args:
        hidden: [M, E] states of all answer tokens. offsets: [2N + 1] i64, where the answers begin, and M.

    Returns:
        [P, E] float32, states of a chosen prefix minus those of its rejected one, and [P] float32 weights that add up
        to 1 for every pair.
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
    """The head w that minimises mean softplus(−w·d) + strength / 2 · Σ_j (s_j w_j)², s_j the spread of feature j.

    Args:
        features: [P, E] float32, the differences d. weights: [P] of their terms.
        strength: of the penalty, which is on standardised features, so that it means the same for every model.

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
