"""The study's answers and their rewards in one small file, without the prompts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from rgtg_fast.evaluation.study.answers import ANSWERS
from rgtg_fast.evaluation.study.ratings import SCORES
from rgtg_fast.evaluation.study.settings import canonical
from rgtg_fast.training.data import read_rows

ARCHIVE = "answers.jsonl.gz"
_ANSWER = (
    "method",
    "index",
    "seed",
    "response",
    "tokens",
    "finish",
    "base_logprob",
    "guided_logprob",
    "guide_reward",
)
_SETTING = ("beta", "top_k", "temperature")


def pack(results: Path) -> Path | None:
    """Writes `answers.jsonl.gz`: a line for each answer with its setting, its rewards by judge, and no prompt.

    Args:
        results: folder of a study.

    Returns:
        The file; None where there are no answers yet.
    """
    if not (results / ANSWERS).is_file():
        return None
    rewards: dict[tuple[str, str, int, int], dict[str, float]] = {}
    for row in _rows(results / SCORES):
        rewards.setdefault(_place(row), {})[row["judge"]] = row["reward"]
    lines = []
    for row in _rows(results / ANSWERS):
        setting = {key: row["setting"].get(key) for key in _SETTING}
        told = {key: row.get(key) for key in _ANSWER} | setting | {"rewards": rewards.get(_place(row), {})}
        lines.append(json.dumps(told, ensure_ascii=False))
    path = results / ARCHIVE
    # The same answers give the same bytes.
    with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        file.write(("\n".join(lines) + "\n").encode())
    return path


def _rows(path: Path) -> list[dict[str, Any]]:
    return list(read_rows(path)) if path.is_file() else []


def _place(row: dict[str, Any]) -> tuple[str, str, int, int]:
    return row["method"], canonical(row["setting"]), row["index"], row["seed"]
