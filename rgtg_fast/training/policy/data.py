"""What a policy is trained on: preference pairs with their texts, or prompts alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.prompts import Prompt
from rgtg_fast.training.data import (
    Messages,
    PreferencePair,
    TokenizedPair,
    TrainingData,
    UnusableError,
    load_pairs,
    prepare_pairs,
    read_rows,
    row_prompt,
)
from rgtg_fast.training.policy.config import PolicyTrainConfig


def load_preferences(
    data: Any, eval_data: Any, config: PolicyTrainConfig, tokenizer: PreTrainedTokenizerBase
) -> TrainingData:
    """Preference pairs to train and to evaluate on, as in `train_policy`."""

    def load(source: Any) -> Any:
        return load_pairs(
            source, chat=tokenizer.chat_template is not None, answers_ended=config.answers_ended
        )

    return prepare_pairs(load(data), None if eval_data is None else load(eval_data), config, tokenizer)


def load_prompts(data: Any, config: PolicyTrainConfig, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    """Prompts alone, each once, of rows that have a `prompt`.

    Raises:
        RGTGError: none is left.
    """
    chat = tokenizer.chat_template is not None
    train: list[TokenizedPair] = []
    sources: dict[int, PreferencePair] = {}
    counts = {"read": 0, "malformed": 0, "duplicates": 0, "too_long": 0}
    seen: set[tuple[int, ...]] = set()
    for index, row in enumerate(read_rows(data)):
        if config.limit is not None and len(train) == config.limit:
            break
        counts["read"] += 1
        prompt = _prompt_of(row, chat)
        if prompt is None:
            counts["malformed"] += 1
            continue
        ids = Prompt(prompt, index).ids(tokenizer)
        if tuple(ids) in seen:
            counts["duplicates"] += 1
        elif len(ids) + config.max_completion_length > config.max_length:
            counts["too_long"] += 1
        else:
            seen.add(tuple(ids))
            train.append(TokenizedPair(ids, [], [], index))
            sources[index] = PreferencePair(prompt, "", "", index)
    if not train:
        raise RGTGError(
            f"no prompts are left of the {counts['read']} rows ({counts['malformed']} without a 'prompt', "
            f"{counts['too_long']} over max_length={config.max_length} with {config.max_completion_length} new tokens)"
        )
    dropped = ", ".join(f"{count} {name}" for name, count in counts.items() if count and name != "read")
    lines = [f"data: {len(train)} of {counts['read']} prompts kept" + (f" ({dropped})" if dropped else "")]
    return TrainingData(train, [], (sources, {}), {"train": {**counts, "kept": len(train)}}, lines)


def _prompt_of(row: Any, chat: bool) -> str | Messages | None:
    """A row's prompt, None where there is none that the model can take."""
    try:
        prompt = row_prompt(row, chat) if isinstance(row, Mapping) else None
    except UnusableError:
        return None
    if isinstance(prompt, str):
        text = prompt.strip()
        return [{"role": "user", "content": prompt}] if text and chat else prompt if text else None
    return prompt if chat and prompt else None
