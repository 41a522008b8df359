"""What a decoder does with its models: engines, templates, tokenizers, cached against uncached, and memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rgtg_fast.config import Guidance
from rgtg_fast.decoder import RewardGuidedDecoder
from rgtg_fast.engine.request import encoded_row
from rgtg_fast.models.attention import own_attention
from rgtg_fast.models.device import without_autocast
from rgtg_fast.models.heads import Head, RewardHead, describe
from rgtg_fast.models.layers import native_refusal
from rgtg_fast.models.prompts import PromptLike, as_prompts
from rgtg_fast.models.quantized import quantization
from rgtg_fast.models.runner import ModelRunner
from rgtg_fast.models.support import sliding_window
from rgtg_fast.models.templates import template_difference
from rgtg_fast.rewards import ContrastiveReward, Reward, SequenceReward, TextReward
from rgtg_fast.rewards.base import Prefix
from rgtg_fast.rewards.compatibility import tokenizer_difference
from rgtg_fast.rewards.runtime import RewardRuntime
from rgtg_fast.rewards.vocabulary import VocabularyScorer

# Tokens of the probe's answer.
PROBE_TOKENS = 8
_CONTEXTS = ("better prompt", "worse prompt")


def inspect_decoder(
    decoder: RewardGuidedDecoder, prompt: PromptLike, new_tokens: int = PROBE_TOKENS
) -> dict[str, Any]:
    """Everything that a user may want to know before a long run, as plain values.

    Args:
        decoder: the decoder, which answers the prompt in this call.
        prompt: a prompt as it will be given: a text, chat messages or token ids.
        new_tokens: tokens of the answer, whose rewards and log-probabilities are compared with the models' own.

    Returns:
        `RewardGuidedDecoder.describe()`'s entries without the bytes of the caches, and
        `models`: role, architecture, parameters, dtype, engine and why, context, limit, window and bytes of each;
        `rewards`: the reward or the parts of a mixture: name, whose weights compute it, heads, and whether it scores
        the whole vocabulary at once;
        `prompts`: the text that each model reads, special tokens included, and its number of tokens;
        `template`: how the base model's chat template reads a prompt and its answer in another way than a whole chat,
        None where it does not;
        `tokenizers`: for each reward model's own, how it differs from the base model's, None where it does not;
        `cached_vs_uncached`: the largest differences of the probe's log-probabilities and rewards (None without a
        reward) from those of the models' own uncached forwards;
        `memory`: bytes of the weights, of one row of `row_tokens` tokens in the caches, of the free memory (None where
        it is unknown), and the rows that fit it.

    Raises:
        RGTGError: the prompt cannot be answered.

    Example:
        >>> inspect_decoder(decoder, "Hello")["memory"]["rows_that_fit"]  # doctest: +SKIP
        1480
    """
    # Before the prompts are shown: a prompt that cannot be answered is refused with the words of `generate`.
    compared = cached_difference(decoder, prompt, new_tokens)
    facts = decoder.describe()
    del facts["cache_bytes"]
    return {
        **facts,
        "models": [_model_facts(*each) for each in _models(decoder)],
        "rewards": [_reward_facts(part) for part in _parts(decoder)],
        "prompts": _prompts(decoder, prompt),
        "template": _template(decoder),
        "tokenizers": _tokenizers(decoder),
        "cached_vs_uncached": compared,
        "memory": _memory(decoder),
    }


# ---- models ----------------------------------------------------------------------------------------------------------


def _parts(decoder: RewardGuidedDecoder) -> list[Reward]:
    """The reward, or the parts of a mixture."""
    return [] if decoder.reward is None else [part for part in decoder.reward.stateful() if not part.parts]


def _models(decoder: RewardGuidedDecoder) -> Iterator[tuple[str, PreTrainedModel, ModelRunner | None]]:
    """Role, model and runner of each model; a reward over texts has no runner."""
    yield "language model", decoder.lm.runner.model, decoder.lm.runner
    for part in _parts(decoder):
        runners = part.models()
        for runner in runners:
            yield "reward model", runner.model, runner
        loaded = [each for each in part.loaded() if isinstance(each, PreTrainedModel)]
        # The trunk of another one is no model of its own.
        trunks = {id(each.base_model) for each in loaded if each.base_model is not each}
        for model in loaded if not runners else []:
            if id(model) not in trunks:
                yield "reward model", model, None


def _model_facts(role: str, model: PreTrainedModel, runner: ModelRunner | None) -> dict[str, Any]:
    config: Any = model.config.get_text_config()
    return {
        "role": role,
        "name": model.config._name_or_path or type(model).__name__,
        "architecture": type(model).__name__,
        "family": config.model_type,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": quantization(model),
        "weight_bytes": _bytes_of([model]),
        "engine": "none" if runner is None else runner.engine,
        "why": _engine_reason(model, runner),
        "context": getattr(config, "max_position_embeddings", None),
        "limit": None if runner is None else runner.limit,
        "window": _window(config),
    }


def _reward_facts(part: Reward) -> dict[str, Any]:
    return {
        "name": part.name,
        "trunk": part.trunk,
        "heads": [describe(head) for head in _heads(part)],
        "scores_vocabulary": part.scores_vocabulary,
    }


def _heads(part: Reward) -> list[Head]:
    """The heads that rewards are read from; none for an encoder, which pools by itself, and for a function."""
    if isinstance(part, TextReward):
        return [part.head] if isinstance(part.head, (nn.Linear, RewardHead)) else []
    runtimes: list[RewardRuntime] = []
    if isinstance(part, SequenceReward):
        runtimes = [part._runtime]
    elif isinstance(part, VocabularyScorer):
        runtimes = [scorer.runtime for scorer in part._scorers]
    return [runtime.head for runtime in runtimes]


def _engine_reason(model: PreTrainedModel, runner: ModelRunner | None) -> str:
    if runner is None:
        return "it reads whole texts, without a cache"
    if runner.engine == "native":
        return "fused C++ layers can execute it"
    if runner.engine == "triton":
        return "fused kernels between its matrix products can execute it"
    return native_refusal(model) or f"engine={runner.engine!r} was asked for"


def _window(config: Any) -> dict[str, int] | None:
    """Tokens of the sliding window, layers that have one, and all layers; None where none has."""
    tokens = sliding_window(config)
    if tokens is None:
        return None
    layers = int(config.num_hidden_layers)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return {"tokens": tokens, "layers": kinds.count("sliding_attention"), "of": layers}


def _bytes_of(models: Sequence[nn.Module]) -> int:
    """Bytes of parameters and buffers; tied and shared ones count once."""
    tensors = {id(x): x for model in models for x in (*model.parameters(), *model.buffers())}
    return sum(x.nbytes for x in tensors.values())


# ---- prompts and tokenizers ------------------------------------------------------------------------------------------


def _prompts(decoder: RewardGuidedDecoder, given: PromptLike) -> list[dict[str, Any]]:
    (prompt,) = as_prompts(given, decoder.tokenizer)
    ids = prompt.ids(decoder.tokenizer)
    shown = [_prompt("language model", decoder.tokenizer, ids)]
    for part in _parts(decoder):
        if isinstance(part, TextReward):
            read = part.read_ids(Prefix(prompt, ids), "...")
            shown.append(_prompt(f"{part.name}, with an answer", part.tokenizer, read))
            continue
        tokenizer = _own_tokenizer(part) or decoder.tokenizer
        names = [f"{part.name}, {name}" for name in _CONTEXTS] if isinstance(part, ContrastiveReward) else []
        for index, own in enumerate(part.encode(prompt)):
            shown.append(_prompt(names[index] if names else part.name, tokenizer, own))
    return shown


def _template(decoder: RewardGuidedDecoder) -> str | None:
    found = None if decoder.tokenizer is None else template_difference(decoder.tokenizer)
    return None if found is None else found.message("language model", decoder.lm.runner.name)


def _prompt(reader: str, tokenizer: PreTrainedTokenizerBase | None, ids: list[int]) -> dict[str, Any]:
    text = " ".join(map(str, ids))
    if tokenizer is not None:
        text = str(tokenizer.decode(ids, spaces_between_special_tokens=False))
    return {"reader": reader, "text": text, "tokens": len(ids)}


def _own_tokenizer(part: Reward) -> PreTrainedTokenizerBase | None:
    if isinstance(part, TextReward):
        return part.tokenizer
    return next((each for each in part.loaded() if isinstance(each, PreTrainedTokenizerBase)), None)


def _tokenizers(decoder: RewardGuidedDecoder) -> list[dict[str, Any]]:
    base, found = decoder.tokenizer, []
    for part in _parts(decoder):
        own = _own_tokenizer(part)
        if base is not None and own is not None:
            found.append({"of": part.name, "difference": tokenizer_difference(base, own)})
    return found


# ---- cached against uncached -----------------------------------------------------------------------------------------


@torch.inference_mode()
@without_autocast()
def cached_difference(
    decoder: RewardGuidedDecoder, prompt: PromptLike, new_tokens: int = PROBE_TOKENS
) -> dict[str, Any]:
    """Decodes greedily and compares with the models' own uncached forwards and attention over the same tokens.

    Args:
        decoder: the decoder.
        prompt: one prompt.
        new_tokens: tokens of the answer.

    Returns:
        `tokens` compared, and the largest absolute difference of their `logprob` under the base model and of their
        `reward`, None without a reward.

    Raises:
        RGTGError: the prompt cannot be answered.
    """
    reward, lm = decoder.reward, decoder.lm
    (given,) = as_prompts(prompt, decoder.tokenizer)
    greedy = Guidance(k=min(10, lm.vocabulary), temperature=0)
    (row,) = decoder.generate(given.given, new_tokens, greedy, trace=True)
    steps = row.trace or []
    chosen = [next(each for each in step.candidates if each.chosen) for step in steps]
    tokens = [step.token for step in steps]
    runners = [lm.runner, *([] if reward is None else reward.models())]
    with ExitStack() as stack:
        for runner in runners:
            stack.enter_context(own_attention(runner.model))
        ids = given.ids(lm.tokenizer)
        expected = _logprobs(lm.runner, [*ids, *tokens], len(ids), lm.vocabulary)
        rewards = None
        if reward is not None:
            prefix = encoded_row(given, new_tokens, lm, reward)
            rewards = reward.score_answer(prefix, tokens)
    found = None if rewards is None else _largest([cast("float", each.reward) for each in chosen], rewards)
    return {
        "tokens": len(tokens),
        "logprob": _largest([each.logprob for each in chosen], expected),
        "reward": found,
    }


def _logprobs(runner: ModelRunner, ids: list[int], prompt: int, vocabulary: int) -> list[float]:
    """Log-probabilities of the tokens after the first `prompt` ones, by an uncached forward."""
    states = runner.hidden_uncached(ids)[prompt - 1 : -1]
    logits = runner.logits(states.float() if runner.engine == "native" else states)[:, :vocabulary]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    following = torch.tensor(ids[prompt:], device=logits.device).unsqueeze(-1)
    return logits.log_softmax(-1, dtype=dtype).gather(-1, following).squeeze(-1).tolist()


def _largest(found: Sequence[float], expected: Sequence[float]) -> float:
    """The largest absolute difference; equal infinities do not differ."""
    pairs = zip(found, expected, strict=True)
    return max((0.0 if a == b else abs(a - b) for a, b in pairs), default=0.0)


# ---- memory ----------------------------------------------------------------------------------------------------------


def _memory(decoder: RewardGuidedDecoder) -> dict[str, Any]:
    scheduler, tokens = decoder._scheduler, decoder.max_length
    row = scheduler.bytes_per_row(tokens, tokens)
    free = scheduler.memory_for_caches(tokens)
    models = [model for _, model, _ in _models(decoder)]
    return {
        "weight_bytes": _bytes_of(models),
        "row_tokens": tokens,
        "row_bytes": row,
        "free_bytes": free,
        "rows_that_fit": None if free is None or not row else free // row,
    }
