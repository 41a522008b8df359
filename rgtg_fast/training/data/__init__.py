"""Preference data: files and data sets to rows, rows to prompts and answers, and these to token ids."""

from rgtg_fast.training.data.chats import Messages, UnusableError, hh_messages
from rgtg_fast.training.data.layouts import Row, has_ended, row_prompt, without_end
from rgtg_fast.training.data.pairs import (
    PreferencePair,
    TokenizedPair,
    hash_pairs,
    load_pairs,
    split_by_prompt,
    tokenize_pairs,
    without_eos,
)
from rgtg_fast.training.data.prepare import TrainingData, prepare_pairs
from rgtg_fast.training.data.report import DataReport, ends_text
from rgtg_fast.training.data.rows import read_rows

__all__ = [
    "DataReport",
    "Messages",
    "PreferencePair",
    "Row",
    "TokenizedPair",
    "TrainingData",
    "UnusableError",
    "ends_text",
    "has_ended",
    "hash_pairs",
    "hh_messages",
    "load_pairs",
    "prepare_pairs",
    "read_rows",
    "row_prompt",
    "split_by_prompt",
    "tokenize_pairs",
    "without_end",
    "without_eos",
]
