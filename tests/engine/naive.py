"""The published algorithm in a few lines: uncached, one candidate at a time. What the decoder must equal."""

from __future__ import annotations

from typing import Any

import torch


@torch.inference_mode()
def guided_greedy(
    lm: Any, rm: Any, prompt: list[int], k: int, beta: float, steps: int, eos: int | None = None
) -> list[int]:
    """Greedy ARGS / PARGS-G: argmax of log π(v) + β·r(x, y ∘ v) over the top k."""
    answer: list[int] = []
    while len(answer) < steps:
        logits = lm(torch.tensor([prompt + answer]), use_cache=False).logits[0, -1]
        logprobs, candidates = logits.log_softmax(-1).topk(k)
        scores = []
        for logprob, token in zip(logprobs, candidates.tolist(), strict=True):
            hidden = rm.base_model(
                torch.tensor([[*prompt, *answer, token]]), use_cache=False
            ).last_hidden_state[0, -1]
            scores.append(logprob + beta * rm.score(hidden).squeeze())
        token = int(candidates[torch.stack(scores).argmax()])
        if token == eos:
            break
        answer.append(token)
    return answer
