"""T-REG (arXiv 2412.02685): token rewards from contrastive prompts, and the regularizer of preference optimization."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.prompts import Prompt
from rgtg_fast.training.answer_scores import AnswerFile, answer_logprobs, check_context
from rgtg_fast.training.data import Messages, PreferencePair, TokenizedPair
from rgtg_fast.training.folder import Progress, no_progress

TEMPLATES = Path(__file__).with_name("t_reg_templates.yaml")
FIELDS = ("question", "answer")

_FIELD = re.compile(r"\{(\w+)\}")
_SPEAKERS = {"user": "User", "assistant": "Assistant"}


@dataclass(frozen=True)
class Templates:
    """Texts that ask a language model to revise an answer into a better one and into a worse one.

    Attributes:
        better, worse: texts with the fields `{question}` and `{answer}`.

    Example:
        >>> Templates("Improve {answer} to {question}", "Spoil {answer}")
        Traceback (most recent call last):
        ...
        rgtg_fast.errors.RGTGError: the template 'worse' has no {question}: put {question} and {answer} into it
    """

    better: str
    worse: str

    def __post_init__(self) -> None:
        for name in ("better", "worse"):
            text = getattr(self, name)
            if not isinstance(text, str):
                raise RGTGError(f"the template {name!r} is {type(text).__name__}: give a text")
            found = set(_FIELD.findall(text))
            missing = next((field for field in FIELDS if field not in found), None)
            if missing is not None:
                raise RGTGError(
                    f"the template {name!r} has no {{{missing}}}: put {{question}} and {{answer}} into it"
                )
            unknown = next(iter(sorted(found - set(FIELDS))), None)
            if unknown is not None:
                raise RGTGError(
                    f"the template {name!r} has {{{unknown}}}: only {{question}} and {{answer}} are filled in"
                )
        if self.better == self.worse:
            raise RGTGError(
                "the templates 'better' and 'worse' are the same text: all token rewards would be 0"
            )

    @property
    def digest(self) -> str:
        """sha256 of the texts."""
        return hashlib.sha256(f"{self.better}\0{self.worse}".encode()).hexdigest()

    @classmethod
    def load(cls, path: str | os.PathLike[str] = TEMPLATES) -> Templates:
        """Reads templates from a YAML file with the texts `better` and `worse`.

        Raises:
            RGTGError: the file cannot be read, or a template lacks the question or the answer.
        """
        import yaml

        try:
            found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RGTGError(f"cannot read the templates {path}: {error.strerror or error}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RGTGError(
                f"the templates {path} are not YAML: {' '.join(str(error).split())[:120]}"
            ) from error
        if not isinstance(found, dict) or set(found) != {"better", "worse"}:
            raise RGTGError(
                f"the templates {path} are not the two texts 'better' and 'worse': begin with a copy of {TEMPLATES}"
            )
        return cls(**found)

    def prompts(self, prompt: str | Messages, answer: str, chat: bool) -> tuple[Prompt, Prompt]:
        """The prompts x_better and x_worse.

        Args:
            prompt: a text or chat messages. System messages are kept, the other turns become the question.
            answer: the answer to be revised.
            chat: make chats with one user message, else plain texts.
        """
        messages: Messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        system = [message for message in messages if message["role"] == "system"]
        turns = [message for message in messages if message["role"] != "system"]
        question = turns[0]["content"] if len(turns) == 1 else _transcript(turns)
        values = {"question": question.strip(), "answer": answer.strip()}
        better, worse = (
            _FIELD.sub(lambda field: values[field[1]], text) for text in (self.better, self.worse)
        )
        if not chat:
            return Prompt(better), Prompt(worse)
        return (
            Prompt([*system, {"role": "user", "content": better}]),
            Prompt([*system, {"role": "user", "content": worse}]),
        )


def _transcript(turns: Messages) -> str:
    return "\n\n".join(
        f"{_SPEAKERS.get(turn['role'], turn['role'])}: {turn['content'].strip()}" for turn in turns
    )


def contrast(
    prompt: str | Messages,
    answer: str,
    answer_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    templates: Templates,
    index: int = 0,
) -> TokenizedPair:
    """An answer after each of its two contexts, as a pair to be packed; its prompt is the contexts' common beginning.

    Args:
        prompt: the prompt that was answered.
        answer: as a text.
        answer_ids: its tokens, which end both sides of the pair.
        tokenizer: tokenizer of the model.
        templates: templates of the contexts.
        index: row of the source.
    """
    chat = tokenizer.chat_template is not None
    better, worse = (p.ids(tokenizer) for p in templates.prompts(prompt, answer, chat))
    shared = next(
        (i for i, (a, b) in enumerate(zip(better, worse, strict=False)) if a != b),
        min(len(better), len(worse)),
    )
    # Each side starts with at least one token of its context, from which the answer's first token is predicted.
    shared = min(shared, len(better) - 1, len(worse) - 1)
    return TokenizedPair(
        better[:shared], [*better[shared:], *answer_ids], [*worse[shared:], *answer_ids], index
    )


def token_rewards(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages],
    answers: Sequence[str],
    answer_ids: Sequence[Sequence[int]],
    templates: Templates | None = None,
    budget: int = 2048,
) -> list[torch.Tensor]:
    """T-REG's rewards of every token of some answers.

    r̂(y_t) = σ( log π(y_t | x_better, y_<t) − log π(y_t | x_worse, y_<t) ) − ½ (arXiv 2412.02685), from one packed
    forward over [shared context | rest of x_better, y | rest of x_worse, y].

    Args:
        model: a causal language model, the reference π, prepared by `use_packed_attention`.
        tokenizer: tokenizer of the model.
        prompts: one per answer.
        answers: as texts.
        answer_ids: the answers' tokens, with EOS where an answer ended.
        templates: templates of the contexts; None for the project's own (`TEMPLATES`).
        budget: most tokens of a packed row.

    Returns:
        One tensor [n] per answer, in at least float32 on the CPU, with values in [−½, ½].

    Raises:
        RGTGError: a context exceeds the model's, or a reward is NaN.
    """
    templates = templates or Templates.load()
    items = [
        contrast(prompt, answer, ids, tokenizer, templates, index)
        for index, (prompt, answer, ids) in enumerate(zip(prompts, answers, answer_ids, strict=True))
    ]
    check_context(model, items)
    rewards = [torch.empty(0)] * len(items)
    for row in answer_logprobs(model, items, budget):
        for i, better, worse in row:
            rewards[i] = _rewards(better, worse, len(answer_ids[i]), i)
    return rewards


def _rewards(better: torch.Tensor, worse: torch.Tensor, tokens: int, row: int) -> torch.Tensor:
    rewards = torch.sigmoid(better[-tokens:] - worse[-tokens:]) - 0.5
    if rewards.isnan().any():
        raise RGTGError(
            f"a token reward of row {row} is NaN: check the reference model's weights and dtype (float16 overflows: "
            "try bfloat16 or float32)"
        )
    return rewards


def fill_token_rewards(
    folder: str | os.PathLike[str],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[TokenizedPair],
    sources: Sequence[PreferencePair],
    templates: Templates,
    budget: int = 2048,
    autocast: bool = False,
    progress: Progress = no_progress,
) -> AnswerFile:
    """T-REG's rewards of every answer token of preference pairs, computed once and stored in a file for any run.

    The file's name is a hash of what the rewards depend on: the tokens of contexts and answers, the model and the
    precision.

    Args:
        folder: folder of the file.
        model, tokenizer: the reference, as in `token_rewards`.
        pairs: tokenized pairs.
        sources: the same pairs as texts, in the same order.
        templates: templates of the contexts.
        budget: most tokens of a packed row.
        autocast: compute in bfloat16.
        progress: receives a line every 10 seconds.

    Raises:
        RGTGError: as `token_rewards`, or the folder cannot be written.
    """
    items: list[TokenizedPair] = []
    for pair, source in zip(pairs, sources, strict=True):
        for text, ids in ((source.chosen, pair.chosen_ids), (source.rejected, pair.rejected_ids)):
            items.append(contrast(source.prompt, text, ids, tokenizer, templates, pair.index))
    check_context(model, items)
    file = AnswerFile.of(folder, "token-rewards", model, pairs, items, autocast)

    def values(number: int, better: torch.Tensor, worse: torch.Tensor) -> dict[int, torch.Tensor]:
        return {number: _rewards(better, worse, file.tokens(number), items[number].index)}

    file.fill(model, items, values, lambda number: [number], budget, autocast, progress)
    return file


def regularizer(logprobs: torch.Tensor, rewards: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """L_REG(x, y) = − Σ_t β r̂(y_t) log π_θ(y_t | x, y_<t), arXiv 2412.02685.

    Args:
        logprobs: [B, S] of the policy, 0 outside the answers.
        rewards: [B, S] r̂, 0 outside the answers.
        scale: β, or [B] β/|y| for SimPO.

    Returns:
        [B].
    """
    return -(rewards.to(logprobs) * logprobs).sum(-1) * scale


def adaptive_weight(chosen: torch.Tensor, rejected: torch.Tensor, margin: float = 0.0) -> torch.Tensor:
    """w = σ( r_θ(x, y^l) − r_θ(x, y^w) + γ ), the weight of a pair in the preference loss's gradient, detached.

    Args:
        chosen, rejected: [B] rewards r_θ of the answers: β log(π_θ/π_ref), or SimPO's (β/|y|) log π_θ.
        margin: SimPO's γ.
    """
    return torch.sigmoid(rejected.detach() - chosen.detach() + margin)
