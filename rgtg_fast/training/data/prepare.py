"""Loaded preference pairs to token ids to train and to evaluate on, with the counts of what was dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rgtg_fast.training.config import CommonConfig
from rgtg_fast.training.data.pairs import PreferencePair, TokenizedPair, split_by_prompt, tokenize_pairs
from rgtg_fast.training.data.report import DataReport


@dataclass(frozen=True)
class TrainingData:
    """Tokenized data, their texts, and the counts.

    Attributes:
        train: pairs to train on; for prompts alone, pairs without answers.
        evaluation: pairs to evaluate on.
        sources: the texts of `train` and of `evaluation`, each by a pair's index.
        report: counts by stage.
        lines: the same in words.
    """

    train: list[TokenizedPair]
    evaluation: list[TokenizedPair]
    sources: tuple[dict[int, PreferencePair], dict[int, PreferencePair]]
    report: dict[str, Any]
    lines: list[str]


def prepare_pairs(
    loaded: tuple[list[PreferencePair], DataReport],
    eval_loaded: tuple[list[PreferencePair], DataReport] | None,
    config: CommonConfig,
    tokenizer: PreTrainedTokenizerBase,
    notes: Sequence[str] = (),
) -> TrainingData:
    """Takes the first pairs, splits off those to evaluate on, and tokenizes both.

    Args:
        loaded: pairs to train on, as `load_pairs` gives them.
        eval_loaded: pairs to evaluate on; without them, `config.held_out` of the others is split off by prompt.
        notes: further lines about the loaded pairs.

    Raises:
        RGTGError: no pair is left.
    """
    pairs, eval_pairs = loaded[0][: config.limit], []
    if eval_loaded is not None:
        eval_pairs = eval_loaded[0]
    elif config.held_out > 0:
        pairs, eval_pairs = split_by_prompt(pairs, config.held_out, config.seed)

    def tokens(part: list[PreferencePair]) -> tuple[list[TokenizedPair], DataReport]:
        chat = tokenizer.chat_template is not None
        return tokenize_pairs(
            part, tokenizer, config.max_length, min_answer_tokens=config.min_answer_tokens, chat=chat
        )

    train, fitted = tokens(pairs)
    evaluation, eval_fitted = tokens(eval_pairs) if eval_pairs else ([], DataReport())
    report: dict[str, Any] = {"loaded": loaded[1].as_dict(), "train": fitted.as_dict()}
    lines = [f"data: {line}" for line in (*loaded[1].lines(), *notes, *fitted.lines()[1:], fitted.end_line())]
    if eval_pairs:
        report["eval"] = (eval_fitted if eval_loaded is None else eval_loaded[1] + eval_fitted).as_dict()
        lines.append(f"evaluation: {eval_fitted.lines()[0]}")
    sources = ({pair.index: pair for pair in pairs}, {pair.index: pair for pair in eval_pairs})
    return TrainingData(train, evaluation, sources, report, lines)
