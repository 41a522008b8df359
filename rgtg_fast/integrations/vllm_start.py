"""What both of vLLM's runners need: the scorer of an engine, checked against it, and the end of a failed request."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from rgtg_fast.config import Guidance
from rgtg_fast.errors import RGTGError
from rgtg_fast.integrations.settings import ServerSettings, check_reward
from rgtg_fast.scorer import RequestScorer

# Tokens that a reward's instructions may put before a prompt (contrastive prompts).
INSTRUCTION = 256
# Below vLLM's own logger, so that a server shows it.
logger = logging.getLogger("vllm.rgtg_fast")


def start_scorer(vllm_config: Any, device: torch.device) -> tuple[ServerSettings, RequestScorer | None]:
    """Loads the reward model of an engine.

    Args:
        vllm_config: the engine's configuration.
        device: where the engine's logits are.

    Returns:
        settings, scorer: the server's settings, and the scorer; None on a pipeline rank that has no logits.

    Raises:
        RGTGError: the settings, the reward model or the server do not fit each other.
    """
    try:
        settings = ServerSettings.load()
        _check_server(vllm_config)
        requests = _requests(vllm_config, settings)
        return settings, _scorer(vllm_config, settings, requests, device) if _has_logits(
            vllm_config
        ) else None
    except RGTGError as error:
        # vLLM reports an engine that does not start by a traceback; this is its reason in one line.
        logger.error("rgtg_fast: %s", error)
        raise


def guidance_here(settings: ServerSettings, sampling_params: Any) -> tuple[Guidance | None, str]:
    """The guidance of a request in an engine, which an error here would end.

    The front end has checked the request, by settings that it reads with its first request: where their file has
    changed since the engine started, it may let through what the engine refuses.

    Args:
        settings: the engine's.
        sampling_params: of the request.

    Returns:
        guidance, error: None where the request is not guided; and why it cannot be guided, empty where it can.
    """
    try:
        return settings.guidance_of(sampling_params.extra_args), ""
    except RGTGError as error:
        return settings.guidance, f"{error} (did the server's settings change while it ran?)"


def refuse_beams(sampling_params: Any) -> None:
    """Refuses a request of vLLM's beam search, which asks for one token of each beam at a time.

    Raises:
        RGTGError: it has this form.
    """
    if sampling_params.max_tokens == 1 and sampling_params.logprobs and not sampling_params.detokenize:
        raise RGTGError(
            "beam search ranks by log-probabilities without the reward: use sampling with n > 1 on a guided server"
        )


def stop_token(sampling_params: Any, eos_ids: Iterable[int]) -> int:
    """A token that ends a request at once.

    Args:
        sampling_params: of the request.
        eos_ids: of the base model.
    """
    return min(sampling_params.all_stop_token_ids or eos_ids, default=0)


def end_rows(logits: torch.Tensor, failed: torch.Tensor, stops: Sequence[int]) -> torch.Tensor:
    """Leaves the rows of requests that cannot be guided only the token that ends them; the host need not know which.

    Args:
        logits: [R, V] floats, changed in place.
        failed: [R] bool.
        stops: R token ids.

    Returns:
        logits: the same tensor.
    """
    at = torch.arange(len(stops), device=logits.device), torch.tensor(stops, device=logits.device)
    kept = logits[at]
    logits.masked_fill_(failed.unsqueeze(-1), -torch.inf)
    logits[at] = torch.where(failed, torch.zeros_like(kept), kept)
    return logits


def _check_server(vllm_config: Any) -> None:
    model = vllm_config.model_config
    if model.is_encoder_decoder:
        raise RGTGError(f"{model.model} has an encoder: RewardGuide serves decoder-only models")
    multimodal = model.multimodal_config
    if model.is_multimodal_model and not getattr(multimodal, "language_model_only", False):
        raise RGTGError(
            f"{model.model} reads images and a reward model reads tokens: add --language-model-only"
        )
    if model.enable_prompt_embeds:
        raise RGTGError(
            "--enable-prompt-embeds gives prompts without tokens for a reward model: leave it out"
        )


def _requests(vllm_config: Any, settings: ServerSettings) -> int:
    running = vllm_config.scheduler_config.max_num_seqs
    if settings.max_requests is not None and settings.max_requests < running:
        raise RGTGError(
            f"max_requests={settings.max_requests} is below the {running} requests that the server runs at once: "
            f"start it with --max-num-seqs {settings.max_requests}"
        )
    return settings.max_requests or running


def _has_logits(vllm_config: Any) -> bool:
    if vllm_config.parallel_config.pipeline_parallel_size == 1:
        return True
    from vllm.distributed.parallel_state import get_pp_group  # pyright: ignore[reportMissingImports]

    return bool(get_pp_group().is_last_rank)


def _scorer(vllm_config: Any, settings: ServerSettings, requests: int, device: torch.device) -> RequestScorer:
    model, reward = vllm_config.model_config, settings.named_reward()
    check_reward(settings.guidance, reward)
    scorer = RequestScorer.from_pretrained(
        settings.lm or model.model,
        reward,
        device=settings.device or str(device),
        dtype=settings.dtype or model.dtype,
        max_requests=requests,
        max_length=model.max_model_len + (INSTRUCTION if reward.prompt_contexts else 0),
        trust_remote_code=settings.trust_remote_code,
    )
    served = model.get_vocab_size()
    if scorer.vocabulary > served or (settings.lm and scorer.vocabulary != served):
        raise RGTGError(
            f"{settings.lm or model.model} has {scorer.vocabulary} tokens and the served model {served}: "
            "set lm to a base model with the same tokens"
        )
    probe = scorer.add([min(scorer.eos_ids, default=0)])
    length = 1 + scorer.remaining(probe)
    scorer.drop(probe)
    if length < model.max_model_len:
        raise RGTGError(
            f"{settings.reward} reads requests of up to {length} tokens and the server takes {model.max_model_len}: "
            f"start it with --max-model-len {length}"
        )
    return scorer
