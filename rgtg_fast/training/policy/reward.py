"""A reward model as the reward function of TRL's policy-gradient trainers."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rgtg_fast.bundled import resolve
from rgtg_fast.errors import RGTGError
from rgtg_fast.models.adapter import Adapter, is_adapter
from rgtg_fast.models.loading import adapter_model, adapter_tokenizer, load_sequence_classifier
from rgtg_fast.models.prompts import Prompt

# What TRL's RLOOTrainer takes, called with keyword arguments.
RewardFunction: TypeAlias = "Callable[..., list[float | None]]"


def reward_function(
    source: str | os.PathLike[str],
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: int = 8,
) -> RewardFunction:
    """r(x, y) of sampled answers under a reward model, as TRL's trainers call it.

    Args:
        source: folder or hub id of a reward model with one label, of an adapter with its score head, or `bundled:NAME`.
        network, tokenizer: of the policy, whose tokens the reward model must share.
        batch: answers of a forward.

    Raises:
        RGTGError: no such reward model, or one with another vocabulary.
    """
    folder = resolve(str(source))
    if is_adapter(folder):
        adapter = Adapter.load(folder)
        adapter.reward_head()
        model, _ = adapter_model(adapter, (network, tokenizer), network.dtype)
        own = adapter_tokenizer(folder)
    else:
        model, own = load_sequence_classifier(folder, network, network.dtype)
    own = own or tokenizer
    if own.get_vocab() != tokenizer.get_vocab():
        raise RGTGError(
            f"{source} has another vocabulary than the policy: use a reward model over the same tokenizer"
        )
    head: Any = dict(model.named_children()).get("score")
    if head is None:
        raise RGTGError(f"{source} has no `score` head over a causal trunk: use a causal reward model")
    template = own if own.chat_template is not None else tokenizer

    @torch.no_grad()
    def reward(prompts: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        texts = [[*Prompt(p).ids(template), *ids] for p, ids in zip(prompts, completion_ids, strict=True)]
        model.to(network.device)  # pyright: ignore[reportArgumentType]
        rewards: list[float | None] = []
        for start in range(0, len(texts), batch):
            part = [torch.tensor(ids) for ids in texts[start : start + batch]]
            padded = torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(network.device)
            lengths = torch.tensor([len(ids) for ids in part], device=network.device)
            # A causal model does not see the padding behind an answer.
            mask = torch.arange(padded.shape[1], device=network.device) < lengths[:, None]
            hidden = model.base_model(padded, attention_mask=mask.long(), use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(part)), lengths - 1]
            rewards += head(last.to(head.weight.dtype))[:, 0].float().tolist()
        return rewards

    return reward
