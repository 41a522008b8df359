"""Whether a chat template reads a prompt and its answer as the decoder passes them on: in two pieces.

A model is trained on whole chats. The decoder renders a prompt with the template's generation prompt and lets the
answer's tokens follow. A template may put something else before an answer than its generation prompt (Qwen3: an empty
think block), and tokens may join across the end of a prompt. The special tokens that a tokenizer puts around a text
are no part of a rendered chat here, so that neither a second beginning of text nor an end of text before the answer
can occur.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedTokenizerBase

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.prompts import rendered, text_ids

_QUESTION, _ANSWER = "Is water wet?", "Yes, it is wet."
_CHAT = [{"role": "user", "content": _QUESTION}]
_WAY_OUT = (
    "for another form use plain text (--no-chat), or SequenceReward(chat_template=...) for a reward model"
)
# Tokens that a message shows before and after the point of difference.
_BEFORE, _AFTER = 6, 12


@dataclass(frozen=True)
class TemplateDifference:
    """Where a chat that was rendered whole and one in two pieces part.

    Attributes:
        whole: the whole chat around that point.
        pieces: the prompt for an answer and the answer, around that point.
        ends_in: what the prompt ends in and a whole chat does not have before an answer.
        replaced_by: what a whole chat has in its place.
        known: whether a prompt with `replaced_by` behind it reads as the whole chat.
        changed: whether the template does not repeat an answer as it is.
        texts_only: whether decoding is the same, and only the tokens of an answer that is passed as text differ.
    """

    whole: str
    pieces: str
    ends_in: str = ""
    replaced_by: str = ""
    known: bool = False
    changed: bool = False
    texts_only: bool = False

    def message(self, role: str, name: str) -> str:
        """What it means, in one line.

        Args:
            role: what the model is used as.
            name: the model's.
        """
        found = (
            f"the chat template of the {role} {name} reads a whole chat as {self.whole}, and a prompt followed by its "
            f"answer as {self.pieces}"
        )
        if self.changed:
            return f"{found}: it does not repeat an answer as it is, so that rewards read another text"
        if self.replaced_by.isspace() and not self.ends_in:
            return f"{found}: let an answer that you pass as text begin with {self.replaced_by!r}"
        if self.replaced_by and not self.ends_in:
            return (
                f"{found}: the prompt ends before {self.replaced_by!r}, so that the model has to write it and rewards "
                f"read it as part of the answer; {_WAY_OUT}"
            )
        if self.ends_in:
            instead = f" and a whole chat has {self.replaced_by!r} there" if self.replaced_by else ""
            return f"{found}: only the prompt ends in {self.ends_in!r}{instead}; {_WAY_OUT}"
        if self.texts_only:
            return f"{found}: pass the token ids of an answer that was decoded, not its text"
        return f"{found}: tokens join across the end of the prompt; {_WAY_OUT}"


def template_difference(
    tokenizer: PreTrainedTokenizerBase, template: str | None = None
) -> TemplateDifference | None:
    """Compares the ids of a whole chat with those of its prompt and answer.

    Args:
        tokenizer: the model's.
        template: a Jinja chat template in place of the tokenizer's own.

    Returns:
        None where they are the same, and where there is no template or it refuses the chat, which is an error only
        for a prompt that needs it.
    """
    if (template or tokenizer.chat_template) is None:
        return None
    answered = [*_CHAT, {"role": "assistant", "content": _ANSWER}]
    try:
        prompt = rendered(tokenizer, _CHAT, "a question", template, answer_follows=True)
        chat = rendered(tokenizer, answered, "an answered question", template, answer_follows=False)
    except RGTGError:
        return None
    whole, pieces = _ids(tokenizer, chat), _ids(tokenizer, prompt, _ANSWER)
    # The answer's last token may join with what ends a turn.
    if whole[: len(pieces) - 1] == pieces[:-1]:
        return None
    shown = _around(tokenizer, whole, pieces)
    before, answer, _ = chat.rpartition(_ANSWER)
    if not answer:
        return TemplateDifference(*shown, changed=True)
    same = _common(prompt, before)
    ends_in, replaced_by = prompt[same:], before[same:]
    end_of_question = prompt.rfind(_QUESTION) + len(_QUESTION)
    asked = _QUESTION in prompt and same >= end_of_question
    fitted = _ids(tokenizer, before, _ANSWER)
    # Space before an answer is what the answer's first token begins with.
    spaced = not (ends_in + replaced_by).strip()
    known = asked and not ends_in and not spaced and whole[: len(fitted) - 1] == fitted[:-1]
    begun = _ids(tokenizer, prompt)
    texts_only = spaced and not ends_in and whole[: len(begun)] == begun
    return TemplateDifference(*shown, ends_in, replaced_by, known, texts_only=texts_only)


def warn_of_template(
    tokenizer: PreTrainedTokenizerBase | None,
    role: str,
    name: str,
    template: str | None = None,
    *,
    texts: bool,
) -> None:
    """Warns where a whole chat and its two pieces differ.

    Args:
        tokenizer: the model's, None where it came without one.
        role: what the model is used as.
        name: the model's.
        template: a Jinja chat template in place of the tokenizer's own.
        texts: whether answers are passed as texts, or decoded.
    """
    found = None if tokenizer is None else template_difference(tokenizer, template)
    if found is not None and found.texts_only == texts:
        warnings.warn(found.message(role, name), stacklevel=3)


def prompt_ending(
    tokenizer: PreTrainedTokenizerBase, template: str | None, name: str, whole_chats: bool
) -> str:
    """What follows a reward model's rendered prompt in whole chats, before the answer; empty for nothing.

    Args:
        tokenizer: the reward model's.
        template: a Jinja chat template in place of the tokenizer's own.
        name: the reward model's, for the warning where the two differ in another way.
        whole_chats: whether it was trained on whole chats of this template; any difference is a warning otherwise.
    """
    found = template_difference(tokenizer, template)
    if found is None or found.texts_only:
        return ""
    if whole_chats and found.known:
        return found.replaced_by
    warnings.warn(found.message("reward model", name), stacklevel=3)
    return ""


def _ids(tokenizer: PreTrainedTokenizerBase, *texts: str) -> list[int]:
    return [token for text in texts for token in text_ids(tokenizer, text, "a probe")]


def _around(tokenizer: PreTrainedTokenizerBase, whole: list[int], pieces: list[int]) -> tuple[str, str]:
    """Both texts from a few tokens before they part; token by token where the texts are the same."""
    part = _common(whole, pieces)
    shown = [ids[max(0, part - _BEFORE) : part + _AFTER] for ids in (whole, pieces)]
    texts = [cast("str", tokenizer.decode(ids)) for ids in shown]
    if texts[0].startswith(texts[1]) or texts[1].startswith(texts[0]):
        texts = ["|".join(cast("str", tokenizer.decode([token])) for token in ids) for ids in shown]
    return repr(texts[0]), repr(texts[1])


def _common(first: Sequence[object], second: Sequence[object]) -> int:
    """Number of equal items at the beginning of both."""
    pairs = zip(first, second, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
