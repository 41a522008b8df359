"""Checks of a call before the first forward: its arguments, its rows, and the memory that it needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rgtg_fast.config import Guidance, whole
from rgtg_fast.engine.batch import Row
from rgtg_fast.engine.outputs import Stats
from rgtg_fast.engine.stopping import StoppingCriteria, as_stops
from rgtg_fast.errors import MemoryTooSmallError, RGTGError, shown
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.prompts import Prompt, PromptLike, as_prompts, check_known
from rgtg_fast.models.runner import ModelRunner
from rgtg_fast.models.support import changes_beyond
from rgtg_fast.profiling import PhaseTimer
from rgtg_fast.rewards.base import Reward


class Arguments:
    """The arguments of a call as lists, one entry per prompt.

    Args:
        prompts: as in `RewardGuidedDecoder.generate`, like the others.
        max_new_tokens: tokens of an answer.
        guidance: one, or one per prompt.
        seed: one, or one per prompt.
        tokenizer: the base model's.

    Raises:
        RGTGError: an argument of another kind, or counts that differ.
    """

    def __init__(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        max_new_tokens: int,
        guidance: Guidance | Sequence[Guidance],
        seed: int | Sequence[int],
        tokenizer: Any,
    ):
        self.max_new_tokens = whole("max_new_tokens", max_new_tokens, 1, 128)
        self.prompts = as_prompts(prompts, tokenizer)
        count = len(self.prompts)
        self.guidance = list(guidance) if isinstance(guidance, Sequence) else [guidance] * count
        given: Any = seed
        given = given.tolist() if hasattr(given, "tolist") else given
        self.seeds = list(given) if isinstance(given, Sequence) else [given] * count
        for name, values in (("guidance", self.guidance), ("seed", self.seeds)):
            if len(values) != count:
                raise RGTGError(
                    f"{len(values)} values of {name} for {count} prompts: pass one, or one per prompt"
                )

    def rows(self, lm: LanguageModel, reward: Reward) -> list[Row]:
        """A row for each prompt.

        Raises:
            RGTGError: a setting that the models do not allow, or a prompt that is empty, unknown or too long.
        """
        rows = []
        for prompt, guidance, seed in zip(self.prompts, self.guidance, self.seeds, strict=True):
            check_guidance(guidance, lm, reward)
            number = whole("seed", seed, example=0)
            if not -(2**63) <= number < 2**63:
                raise RGTGError(f"seed={shown(number)} is not a 64-bit whole number: use for example 0")
            rows.append(encoded_row(prompt, self.max_new_tokens, lm, reward, guidance, number))
        return rows


@dataclass
class Run:
    """One call: its rows, settings and statistics.

    Attributes:
        rows: one per prompt.
        stopping: ends the answers.
        trace: whether every step's candidates are kept.
        timer: timer of the phases.
        stats: the cost so far.
        started: `time.perf_counter()` at the beginning.
        process: changes the base model's logits [B, V] for the rows given before candidates are selected; None leaves
            them.
    """

    rows: list[Row]
    stopping: StoppingCriteria
    trace: bool
    timer: PhaseTimer
    stats: Stats = field(default_factory=Stats)
    started: float = field(default_factory=time.perf_counter)
    process: Callable[[list[Row], torch.Tensor], torch.Tensor] | None = None

    @property
    def max_new_tokens(self) -> int:
        """Tokens of an answer, end-of-sequence included."""
        return self.stopping.max_new_tokens

    @property
    def gated(self) -> bool:
        """Whether any row has a gate."""
        return any(row.guidance.gate_entropy for row in self.rows)


def as_run(
    rows: list[Row],
    lm: LanguageModel,
    max_new_tokens: int,
    stop: str | Sequence[str] | None,
    trace: bool,
    timer: PhaseTimer,
) -> Run:
    """A run of rows.

    Raises:
        RGTGError: invalid stop strings, or stop strings without a tokenizer.
    """
    stops = as_stops(stop)
    if stops and lm.tokenizer is None:
        raise RGTGError(
            "stop strings need text and the model came without a tokenizer: pass (model, tokenizer)"
        )
    return Run(rows, StoppingCriteria(lm, max_new_tokens, stops), trace, timer)


def encoded_row(
    prompt: Prompt,
    new_tokens: int,
    lm: LanguageModel,
    reward: Reward,
    guidance: Guidance = Guidance(),
    seed: int = 0,
) -> Row:
    """A prompt with its token ids under the base model and in the reward's contexts.

    Args:
        prompt: as given.
        new_tokens: number of new tokens that will follow it.
        lm: the base model.
        reward: bound to it.
        guidance: guidance of the request.
        seed: seed of the request.

    Raises:
        RGTGError: a prompt that is empty or unknown, or together with the new tokens exceeds a context.
    """
    ids = prompt.ids(lm.tokenizer)
    known = min(lm.runner.head.out_features, lm.runner.embeddings)
    check_known(ids, known, f"prompt {prompt.index}")
    row = Row(prompt, ids, weights=guidance.weights, guidance=guidance, seed=seed)
    row.encoded = reward.encode(prompt)
    if not ids:
        raise RGTGError(f"prompt {prompt.index} is empty: pass at least one token")
    limits = [("base model", len(ids), lm.runner.limit)]
    if reward.limit is not None:
        limits += [("reward", len(own), reward.limit) for own in row.encoded]
    for role, length, limit in limits:
        if length + new_tokens > limit:
            fewer = f" or use max_new_tokens <= {limit - length}" if length < limit else ""
            raise RGTGError(
                f"prompt {prompt.index} has {length} tokens for the {role}; {new_tokens} new ones exceed its "
                f"{limit}{_beyond(limit, [lm.runner, *reward.models()])}: shorten the prompt{fewer}"
            )
    return row


def _beyond(limit: int, models: list[ModelRunner]) -> str:
    """What a model does beyond a context of `limit` tokens, where that is why it has no more."""
    dynamic = any(changes_beyond(model.model.config.get_text_config(), limit) for model in models)
    return ", beyond which every further token changes all frequencies of its dynamic rope" if dynamic else ""


def check_guidance(guidance: Guidance, lm: LanguageModel, reward: Reward) -> None:
    """Refuses settings that the base model or the reward does not allow.

    Raises:
        RGTGError: saying what to use instead.
    """
    if not isinstance(guidance, Guidance):
        raise RGTGError(f"guidance={shown(guidance)} is not a Guidance: pass Guidance(k=10, beta=1.0)")
    support = guidance.support
    if support != "all" and guidance.k > lm.vocabulary:
        raise RGTGError(
            f"k={guidance.k} exceeds the vocabulary (V={lm.vocabulary}): use k <= {lm.vocabulary}"
        )
    allowed = reward.scores_vocabulary if reward.gives_rewards else support == "all"
    if support != "lm" and not allowed:
        name = reward.name if reward.gives_rewards else "no reward"
        raise RGTGError(
            f"support={support!r} needs a reward over the whole vocabulary and this decoder has {name}: "
            "use support='lm', or a reward such as ContrastiveReward"
        )
    if guidance.gate_entropy is not None and not reward.appends:
        name = reward.name if reward.gives_rewards else "none"
        raise RGTGError(
            f"gate_entropy={guidance.gate_entropy} needs a reward that can catch up with skipped tokens and this "
            f"decoder has {name}: use a SequenceReward with a cache of its own (an adapter with share_trunk=False)"
        )
    if guidance.weights is not None and len(guidance.weights) != reward.parts:
        raise RGTGError(
            f"{len(guidance.weights)} weights in the guidance and this decoder mixes {reward.parts} rewards: "
            "pass one weight per reward of a MixtureReward"
        )


# ---- memory ----------------------------------------------------------------------------------------------------------


def check_fits(
    bytes_per_row: int, rows: int, length: int, free: int | None, setting: str = "max_batch"
) -> None:
    """Refuses a batch whose caches would not fit, before anything is allocated.

    Args:
        bytes_per_row: bytes of all caches, for one row.
        rows: rows of the batch.
        length: tokens of a row.
        free: bytes, None to skip the check.
        setting: the setting that determines the number of rows, for the message.

    Raises:
        MemoryTooSmallError: with the number of rows that would fit.
    """
    needed = bytes_per_row * rows
    if free is None or needed <= free:
        return
    fit = free // bytes_per_row
    way_out = (
        f"{setting}={fit} would fit" if fit else "not even one row fits: use fewer tokens or a smaller dtype"
    )
    raise MemoryTooSmallError(
        f"the KV caches of {rows} rows of {length} tokens need {needed / 2**30:.2f} GiB and "
        f"{free / 2**30:.2f} GiB are free: {way_out}"
    )


def check_candidates(bytes_of_one: int, k: int, rows: int, free: int | None) -> None:
    """Refuses more candidates than a step could score.

    Args:
        bytes_of_one: bytes of one candidate of every row.
        k: candidates of a row.
        rows: rows of the batch.
        free: bytes, None to skip the check.

    Raises:
        MemoryTooSmallError: with the number of candidates that would fit.
    """
    # A rough estimate, meant for absurd k: it refuses nothing below a GiB.
    if free is None or bytes_of_one * k <= max(free, 2**30):
        return
    raise MemoryTooSmallError(
        f"scoring k={k} candidates of {rows} rows needs {bytes_of_one * k / 2**30:.2f} GiB and {free / 2**30:.2f} GiB "
        f"are free: k={free // bytes_of_one} would fit"
    )


# Bytes on the host of an answer's objects and lists, and of a token's id, log-probability and reward.
_ANSWER, _TOKEN = 2500, 100


def check_samples(samples: int, prompts: int, prompt_tokens: int, new_tokens: int, free: int | None) -> None:
    """Refuses more answers to a prompt than the host's memory can keep until the best is known.

    Args:
        samples: per prompt.
        prompts: the prompts whose samples are kept at once.
        prompt_tokens: number of tokens of the longest prompt.
        new_tokens: largest number of new tokens of an answer.
        free: bytes on the host, None to skip the check.

    Raises:
        MemoryTooSmallError: with the number of samples that would fit.
    """
    # An answer may end early: only its first token is counted, so that nothing is refused that fits.
    each = prompts * (_ANSWER + 8 * prompt_tokens + _TOKEN * min(new_tokens, 1))
    if free is None or samples * each <= free:
        return
    raise MemoryTooSmallError(
        f"n={samples} answers per prompt need {samples * each / 2**30:.1f} GiB or more and {free / 2**30:.1f} GiB are "
        f"free: n={free // each} would fit"
    )
