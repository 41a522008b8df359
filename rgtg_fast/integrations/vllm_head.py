"""vLLM's logits processor for rewards that are linear in the served model's own states, with β per request.

Such a reward costs one product with a matrix of the head's size, or k dot products a row, and no model of its own.
`RewardWorker` (`vllm_worker.py`) hands it the states.

    vllm serve MODEL --worker-cls rgtg_fast.integrations.vllm_worker.RewardWorker \\
        --logits-processors rgtg_fast.integrations.vllm_head:HeadRewardGuide
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from vllm.v1.sample.logits_processor import (  # pyright: ignore[reportMissingImports]
    BatchUpdate,
    LogitsProcessor,
)
from vllm.v1.sample.logits_processor.builtin import (  # pyright: ignore[reportMissingImports]
    process_dict_updates,
)

from rgtg_fast.config import Guidance
from rgtg_fast.decoder import RewardGuidedDecoder
from rgtg_fast.engine.guided_logits import GuidedLogits
from rgtg_fast.errors import RGTGError
from rgtg_fast.integrations.fold import linear_reward
from rgtg_fast.integrations.settings import ServerSettings
from rgtg_fast.integrations.vllm_start import end_rows, guidance_here, logger, refuse_beams, stop_token

WORKER = "rgtg_fast.integrations.vllm_worker.RewardWorker"
# Relative difference of logits that rounding explains.
_ROUNDING = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}


class HeadRewardGuide(LogitsProcessor):
    """Adds β·(W_r·h) to the log-probabilities of a request's candidates, where h is the state that its logits have.

    Args:
        vllm_config: vLLM's configuration.
        device: of the logits.
        is_pin_memory: unused.

    Raises:
        RGTGError: settings that cannot be used, another worker, speculative decoding, or pipeline ranks.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        with logged():
            if vllm_config.speculative_config is not None:
                raise RGTGError(
                    "a guided server decodes one token a step: start it without speculative decoding"
                )
            if vllm_config.parallel_config.pipeline_parallel_size > 1:
                raise RGTGError(
                    "a head-only reward was not tried with pipeline ranks: start the server without them"
                )
            if vllm_config.parallel_config.worker_cls != WORKER:
                raise RGTGError(
                    f"this processor needs the states that its worker keeps: add --worker-cls {WORKER}"
                )
            self._settings = ServerSettings.load()
            _check_guidance(self._settings.guidance)
        self._device, self._model_config = device, vllm_config.model_config
        # By row of the batch: a request's guidance, and the token that ends it where it cannot be guided.
        self._requests: dict[int, tuple[Guidance, int | None]] = {}
        self._eos_ids: frozenset[int] = frozenset()
        self._states: torch.Tensor | None = None
        self._weight = self._bias = torch.empty(0)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuses a request with bad arguments.

        Raises:
            RGTGError: a ValueError, which the server answers with status 400.
        """
        guidance = _settings().guidance_of(sampling_params.extra_args)
        if guidance is not None:
            _check_guidance(guidance)
            refuse_beams(sampling_params)

    def attach(self, model: Any) -> None:
        """Keeps the states that a loaded model computes logits of, and loads the reward.

        Args:
            model: vLLM's, with `compute_logits`.

        Raises:
            RGTGError: a reward that is not linear in this model's states, or a model whose logits are not a product of
                its head with them.
        """
        settings, compute = self._settings, model.compute_logits
        decoder = RewardGuidedDecoder.from_pretrained(
            settings.lm or self._model_config.model,
            settings.reward,
            device="cpu",
            dtype=torch.float32,
            label=settings.label,
            trust_remote_code=settings.trust_remote_code,
            reward_weights=settings.reward_weights,
        )
        weight, bias = linear_reward(decoder)
        self._eos_ids = decoder.lm.eos_ids
        _check_product(compute, decoder.lm.runner.head, self._device, self._model_config.dtype)
        self._weight, self._bias = (
            each.to(self._device, self._model_config.dtype) for each in (weight, bias)
        )

        def kept(states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._states = states
            return compute(states, *args, **kwargs)

        model.compute_logits = kept

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(
            self._requests, batch_update, lambda params, prompt, output: self._request(params)
        )

    def _request(self, params: Any) -> tuple[Guidance, int | None] | None:
        """What `_requests` holds of a request that has come; None where it is not guided."""
        guidance, error = guidance_here(self._settings, params)
        if guidance is None:
            return None
        # More candidates than tokens are all of the tokens.
        guidance = replace(guidance, k=min(guidance.k, len(self._weight)))
        if not error:
            return guidance, None
        logger.error("rgtg_fast: a request ends at once: %s", error)
        return guidance, stop_token(params, self._eos_ids)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._requests:
            return logits
        if self._states is None or len(self._states) != len(logits):
            raise RGTGError(f"{len(logits)} rows of logits have no states: report this with vLLM's version")
        rows = torch.tensor(list(self._requests), device=logits.device)
        settings, stops = zip(*self._requests.values(), strict=True)
        guided = self._guided(logits[rows], self._states[rows], settings)
        if any(stop is not None for stop in stops):
            failed = torch.tensor([stop is not None for stop in stops], device=logits.device)
            guided = end_rows(guided, failed, [stop or 0 for stop in stops])
        logits[rows] = guided
        return logits

    def _guided(
        self, logits: torch.Tensor, states: torch.Tensor, settings: Sequence[Guidance]
    ) -> torch.Tensor:
        """log π + β·r [R, V] on each row's support, -inf elsewhere, from logits [R, V] and states [R, E]."""
        support = GuidedLogits(logits, settings)
        if all(guidance.support == "lm" for guidance in settings):
            support.select()
            tokens = support.candidates  # [R, K]
            products = torch.einsum("rke,re->rk", self._weight[tokens], states)
            support.rewards = (products + self._bias[tokens]).float()
        else:
            support.select_with(torch.nn.functional.linear(states, self._weight, self._bias).float())
        scores, _ = support.scores()
        return torch.full_like(logits, -torch.inf).scatter_(1, support.candidates, scores)


@contextmanager
def logged() -> Iterator[None]:
    """Logs an error in one line, since vLLM reports an engine that does not start by a traceback."""
    try:
        yield
    except RGTGError as error:
        logger.error("rgtg_fast: %s", error)
        raise


def _check_guidance(guidance: Guidance) -> None:
    for name in ("weights", "gate_entropy"):
        if getattr(guidance, name) is not None:
            raise RGTGError(f"{name} is not served with a head-only reward: leave it out")


@lru_cache(maxsize=1)
def _settings() -> ServerSettings:
    return ServerSettings.load()


@torch.no_grad()
def _check_product(compute: Any, head: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Refuses a model whose logits are another function of the states than its head.

    Raises:
        RGTGError: the logits differ by more than rounding.
    """
    noise = torch.randn(2, head.in_features, generator=torch.Generator().manual_seed(0))
    states = noise.to(device, dtype)
    own, expected = compute(states), head(states.float().cpu())
    if own is None:
        return  # a rank that samples nothing
    if own.shape != expected.shape:
        raise RGTGError(
            f"the served model has {own.shape[1]} logits and its files a head of {expected.shape[1]}"
        )
    error = float((own.float().cpu() - expected).norm() / expected.norm())
    if not error <= _ROUNDING.get(dtype, 1e-3):
        raise RGTGError(
            f"the served model's logits are not its head's product with its states (they differ by {error:.1%}): use "
            "rgtg_fast.integrations.vllm:RewardGuide"
        )
