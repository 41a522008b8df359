"""The ops over a cache that is not ours: transformers' StaticCache, k candidates of a sequence in one forward.

Run: python examples/ops_foreign_cache.py [--compile]

The candidates of a sequence read its keys and values once, whatever k is, and `slots` says in which rows of the cache
the sequences of this step are. A candidate's reward is how sure the model is of what follows it.
"""

import argparse
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    StaticCache,
)

from rgtg_fast.bundled import default_model
from rgtg_fast.ops import commit, resample, topk_logprobs, tree_attention


@dataclass
class Step:
    """What the attention of one forward reads, and the keys and values of its candidates, layer by layer."""

    cache: StaticCache
    lengths: torch.Tensor  # [N]: tokens in each row of the cache
    slots: torch.Tensor  # [B]: the rows of this step
    new: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


def attend(
    module: Any,
    query: torch.Tensor,  # [B, H, k, D]
    key: torch.Tensor,  # [B, G, k, D], of the candidates alone
    value: torch.Tensor,
    mask: None,
    scaling: float,
    step: Step,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers, whose blocks pass `step` through."""
    layer = step.cache.layers[module.layer_idx]
    step.new.append((key, value))
    out = tree_attention(
        query, key, value, layer.keys, layer.values, step.lengths, scale=scaling, slots=step.slots
    )
    return out.transpose(1, 2), None


AttentionInterface.register("candidates", attend)
AttentionMaskInterface.register("candidates", lambda *_, **__: None)


def prefill(
    model: PreTrainedModel, prompts: list[torch.Tensor], room: int
) -> tuple[StaticCache, torch.Tensor, torch.Tensor]:
    """The cache of N prompts, their lengths [N], and the logits [N, V] after each; no token sees the padding."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    cache = StaticCache(config=model.config, max_cache_len=int(lengths.max()) + room)
    model.set_attn_implementation("sdpa")
    # Its name before transformers 5.24 is the second.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    logits = model(pad_sequence(prompts, batch_first=True), **{name: cache}, use_cache=True).logits
    return cache, lengths, logits[torch.arange(len(prompts)), lengths - 1].float()


def score(model: PreTrainedModel, step: Step, candidates: torch.Tensor) -> torch.Tensor:
    """Logits [B, k, V] after each candidate [B, k]: all stand at the position after their sequence."""
    positions = step.lengths[step.slots][:, None].expand_as(candidates)
    return model(candidates, position_ids=positions, use_cache=False, step=step).logits.float()


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: list[torch.Tensor],
    slots: list[int],
    steps: int,
    k: int = 5,
    beta: float = 0.5,
    compiled: bool = False,
) -> torch.Tensor:
    """Answers [B, steps] to the prompts in `slots`; the other prompts wait in the cache."""
    cache, lengths, logits = prefill(model, prompts, steps)
    rows = torch.tensor(slots)
    logits, one, zero = logits[rows], torch.ones(len(rows)), torch.zeros_like(rows)
    model.set_attn_implementation("candidates")
    forward = torch.compile(score, fullgraph=True) if compiled else score
    answers = []
    for _ in range(steps):
        logprobs, tokens, _ = topk_logprobs(logits, k)
        step = Step(cache, lengths, rows)
        after = forward(model, step, tokens)
        _, _, entropy = topk_logprobs(after.flatten(0, 1), 1)
        choice, _ = resample(
            logprobs, -entropy.view_as(logprobs), beta * one, 0 * one, seed=zero, position=zero
        )
        # Each layer's cache is a tensor of its own, so `commit`, which writes the lengths too, gets a copy of them.
        for layer, (key, value) in zip(cache.layers, step.new, strict=True):
            grown = lengths.clone()
            commit(key[None], value[None], layer.keys[None], layer.values[None], grown, choice, rows)
        lengths = grown
        logits = after[torch.arange(len(rows)), choice]
        answers.append(tokens.gather(1, choice[:, None]).squeeze(1))
    return torch.stack(answers, 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile(fullgraph=True); needs a C++ compiler"
    )
    folder = default_model(print)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    questions = ["Name a river.", "What is the capital of France?", "Describe a forest at dawn."]
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = [
        torch.tensor(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
        for chat in chats
    ]
    slots = [2, 0]
    answers = decode(model, prompts, slots, 20, compiled=parser.parse_args().compile)
    for slot, answer in zip(slots, answers, strict=True):
        print(questions[slot], "-", tokenizer.decode(answer, skip_special_tokens=True).strip())


if __name__ == "__main__":
    main()
