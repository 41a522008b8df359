"""Judges: reward models that rate finished answers, and whether one of them also guides the decoding."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rgtg_fast.bundled import resolve
from rgtg_fast.decoder import RewardGuidedDecoder
from rgtg_fast.errors import RGTGError
from rgtg_fast.models.adapter import Adapter, is_adapter
from rgtg_fast.models.loading import (
    ModelAndTokenizer,
    adapter_model,
    adapter_tokenizer,
    context_length,
    load_sequence_classifier,
)
from rgtg_fast.models.prompts import Prompt, PromptLike, text_ids
from rgtg_fast.models.templates import prompt_ending
from rgtg_fast.rewards import SequenceReward, named_guide
from rgtg_fast.rewards.base import Prefix, Reward
from rgtg_fast.rewards.parse import CONTRASTIVE, PREFIXES
from rgtg_fast.training.data import without_end, without_eos
from rgtg_fast.training.packing import use_packed_attention

WEIGHTS = "*.safetensors"
_RECIPE = "rgtg_fast.json"
# Separates the terms of a mixture's name: a plus sign before a weight.
_TERMS = re.compile(r"\+(?=\s*[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?\s*\*)")


def load_classifier(
    source: str,
    base: Callable[[str | None], ModelAndTokenizer],
    given: str | None = None,
    label: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal reward model for packed rows, an adapter merged into its base, and its tokenizer.

    Args:
        source: folder, hub id or `bundled:NAME`.
        base: loads a base model by name, None for the default one.
        given: the base model that the user named; by default, an adapter's own is loaded.
        label: as in `SequenceReward`.

    Raises:
        RGTGError: no causal reward model there, or several labels and none chosen.
    """
    folder = resolve(source)
    if is_adapter(folder):
        adapter = Adapter.load(folder)
        adapter.reward_head()
        if label is not None:
            raise RGTGError(f"{source} is an adapter, which has one label, and label={label!r}: leave it out")
        own = given is None and adapter.base_name and Path(adapter.base_name).is_dir()
        model, tokenizer = adapter_model(adapter, base(adapter.base_name if own else given), None)
        tokenizer = adapter_tokenizer(folder) or tokenizer
    else:
        model, tokenizer = load_sequence_classifier(folder, base(given)[0], None, label)
    if "score" not in dict(model.named_children()):
        raise RGTGError(
            f"{source} ({type(model).__name__}) has no `score` head over a causal trunk: use --reward text:{source}"
        )
    assert tokenizer is not None
    use_packed_attention(model)
    return model, tokenizer


@dataclass(frozen=True)
class Rating:
    """A judge's reward of one answer.

    Attributes:
        ended: after an end-of-sequence token, which whole answers have in training.
        unended: at its last token, as guided decoding reads an answer that was cut off; `ended` for an empty one.
    """

    ended: float
    unended: float


class Judge:
    """Rates whole answers.

    A judge reads texts with its own tokenizer and chat template, so that answers of any program are rated alike.

    Args:
        name: folder or hub id of a reward model, `bundled:NAME`, or a reward's name such as `text:PATH`.
        base: model and tokenizer that an adapter belongs to or a `Reward` is bound to; its dtype is the judge's.
        budget: tokens of a packed row of preference pairs (`score_pairs`).

    Attributes:
        scorer: a causal model for packed rows, or a `Reward` that is bound to the base model.
        tokenizer: tokenizer of the scorer.
        template: chat template of the tokenizer, the base model's where it has none, None where neither has.
        ending: what follows a rendered prompt in the scorer's whole chats, before the answer.

    Raises:
        RGTGError: nothing there, or no reward model.
    """

    def __init__(self, name: str, base: ModelAndTokenizer, budget: int = 2048):
        self.name, self.budget = name, budget
        lender = base[1]
        self.scorer: PreTrainedModel | Reward
        reward = named_guide(name)
        if type(reward) is SequenceReward:
            self.scorer, self.tokenizer = load_classifier(str(reward.source), lambda _: base)
        else:
            bound = RewardGuidedDecoder.from_pretrained(base, reward=reward)
            assert bound.reward is not None
            assert bound.tokenizer is not None
            self.scorer, self.tokenizer = bound.reward, bound.tokenizer
        lent = None if lender is None else lender.chat_template
        self.template = cast("str | None", self.tokenizer.chat_template or lent)
        self.ending = ""
        if type(reward) is SequenceReward:
            # The trainer of this package, which writes adapters, encodes prompt and answer apart.
            whole_chats = not is_adapter(resolve(str(reward.source)))
            self.ending = prompt_ending(self.tokenizer, None, name, whole_chats)

    def rate(self, prompts: Sequence[PromptLike], answers: Sequence[str]) -> Iterator[tuple[int, Rating]]:
        """Index and rating of each answer, one after the other.

        An answer's rating is the same to the last digit whatever else is rated, so that a study that was killed and
        resumed has the same numbers as one that was not.

        Args:
            prompts: as the decoder takes them, one per answer.
            answers: texts; an empty one is its end token alone.

        Raises:
            RGTGError: an answer over the context, or a reward that is NaN.
        """
        for index, (given, answer) in enumerate(zip(prompts, answers, strict=True)):
            prompt = Prompt(given, index)
            prompt_ids = prompt.ids(self.tokenizer, self.template, self.ending)
            ids = self._answer_ids(index, answer)
            if isinstance(self.scorer, Reward):
                rating = self._by_reward(self.scorer, Prefix(prompt, prompt_ids), ids)
            else:
                rating = self._by_model(self.scorer, prompt_ids, ids, index)
            if math.isnan(rating.ended) or math.isnan(rating.unended):
                raise RGTGError(
                    f"the judge {self.name} rates answer {index} with NaN: check its weights and dtype (float16 "
                    "overflows: try bfloat16 or float32)"
                )
            yield index, rating

    @torch.inference_mode()
    def _by_model(
        self, model: PreTrainedModel, prompt_ids: Sequence[int], ids: Sequence[int], index: int
    ) -> Rating:
        """Cuts the beginning of a prompt that does not fit the context together with the answer."""
        context = context_length(model)
        left = context - len(ids)
        if left < 1:
            raise RGTGError(
                f"answer {index} has {len(ids)} tokens for the judge {self.name}, whose context holds {context}: judge "
                "shorter answers or use another judge"
            )
        tokens = torch.tensor([[*prompt_ids[-left:], *ids]], device=model.device)
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        rewards = cast("list[float]", model.score(hidden[0, -min(2, len(ids)) :])[:, 0].float().tolist())  # pyright: ignore[reportCallIssue]
        return Rating(rewards[-1], rewards[0])

    @torch.inference_mode()
    def _by_reward(self, reward: Reward, prefix: Prefix, ids: Sequence[int]) -> Rating:
        rewards = reward.score_answer(prefix, ids)
        ended = reward.answer_reward(rewards)
        return Rating(ended, reward.answer_reward(rewards[:-1]) if rewards[1:] else ended)

    def _answer_ids(self, index: int, text: str) -> list[int]:
        eos = cast("int | None", self.tokenizer.eos_token_id)
        if eos is None:
            raise RGTGError(
                f"the tokenizer of the judge {self.name} has no EOS token: set tokenizer.eos_token"
            )
        ids = text_ids(self.tokenizer, without_end(text)[0].strip(), f"answer {index}")
        return [*without_eos(ids, eos), eos]


@functools.lru_cache(maxsize=64)
def _digest(path: str, size: int, modified: int) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def weights_digest(folder: str | Path) -> str | None:
    """sha256 of the weights in a folder or GGUF file, 16 hexadecimal digits; None where there are none (a hub id).

    Two folders with the same weights have the same digest.
    """
    path = Path(folder)
    files = [path] if path.is_file() else sorted(path.glob(WEIGHTS)) or sorted(path.glob("*.gguf"))
    if not files:
        return None
    stats = [(file, file.stat()) for file in files]
    parts = [_digest(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def folders_of(name: str) -> list[str]:
    """The folders or hub ids in the name of a reward, `bundled:NAME` resolved.

    Example:
        >>> folders_of("mixture:0.7*farma:one+0.3*eft:two,three")
        ['one', 'two', 'three']
    """
    if name == CONTRASTIVE:
        return []
    kind, colon, rest = name.partition(":")
    if not colon or kind not in PREFIXES:
        return [resolve(name)]
    if kind == "mixture":
        terms = _TERMS.split(rest)
        return [folder for term in terms for folder in folders_of(term.partition("*")[2].strip())]
    paths = rest.split(",") if kind == "eft" else [rest]
    return [resolve(path.strip()) for path in paths]


def weights_of(name: str) -> dict[str, str]:
    """Digests of the weights in the folders in the name of a reward; folders without weights are left out."""
    found = {folder: weights_digest(folder) for folder in folders_of(name)}
    return {folder: digest for folder, digest in found.items() if digest is not None}


def training_data(name: str) -> set[str]:
    """Hashes of the data that the models in the name of a reward were trained on, where they are known."""
    hashes = set()
    for folder in folders_of(name):
        recipe = Path(folder) / _RECIPE
        if recipe.is_file():
            data_hash: Any = json.loads(recipe.read_text(encoding="utf-8")).get("data_sha256")
            hashes |= {data_hash} if data_hash else set()
    return hashes


def conflicts(judges: dict[str, str], rewards: Sequence[str]) -> list[str]:
    """A warning for every judge that also guides the decoding, or was trained on the same data as a reward that does.

    Args:
        judges: model of each judge, by the judge's name.
        rewards: names of the rewards that guide the decoding.
    """
    lines = []
    for name, source in judges.items():
        for reward in dict.fromkeys(rewards):
            same = set(weights_of(source).values()) & set(weights_of(reward).values())
            paths = [{_place(folder) for folder in folders_of(one)} for one in (source, reward)]
            if same or paths[0] & paths[1]:
                lines.append(
                    f"the judge {name} is the reward model {reward} that guides the decoding: its rewards say how "
                    "well that model was followed, not how good the answers are"
                )
            elif training_data(source) & training_data(reward):
                lines.append(
                    f"the judge {name} and the reward model {reward} were trained on the same data: their errors "
                    "are correlated"
                )
    return lines


def _place(folder: str) -> str:
    return str(Path(folder).resolve()) if Path(folder).is_dir() else folder
