"""The answers of a study: missing ones are decoded, and each is written to a file before the next ones begin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from rgtg_fast.decoder import RewardGuidedDecoder
from rgtg_fast.engine.outputs import GeneratedRow, Stats
from rgtg_fast.errors import RewardNaNError, RGTGError
from rgtg_fast.evaluation.jsonl import JsonlWriter
from rgtg_fast.evaluation.judge import weights_digest, weights_of
from rgtg_fast.evaluation.study.prompts import StudyPrompt, as_prompt, given_prompt, prompt_seed
from rgtg_fast.evaluation.study.settings import Cell, Study, canonical
from rgtg_fast.models.adapter import Adapter, is_adapter
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.loading import ModelAndTokenizer, adapter_model, load_causal_lm
from rgtg_fast.models.prompts import Prompt, PromptLike
from rgtg_fast.rewards import SequenceReward, named_guide
from rgtg_fast.rewards.base import Reward
from rgtg_fast.training.data import UnusableError, has_ended, read_rows, without_end

ANSWERS = "answers.jsonl"
FIELDS = ("method", "setting", "index", "seed", "prompt", "response", "tokens")
# Lines about the progress that a cell prints.
PROGRESS_LINES = 5
Answer = dict[str, Any]
# Identifies an answer within a cell: its prompt and its seed.
Key = tuple[str, int]
# The study's model in a dtype, None for the study's own.
Bases = Callable[[str | None], ModelAndTokenizer]


class Answers:
    """Answers every prompt of a study in every cell; answers that are in the file already are kept.

    Args:
        study: the settings.
        bases: gives the study's model in a dtype, None for the study's own.
        name: name of the study's model in the results.
        answers_file: answers.jsonl.
        prompts: the prompts that are answered.
        progress: receives lines about the progress.

    Attributes:
        warnings: what a reader of the results has to know.
    """

    def __init__(
        self,
        study: Study,
        bases: Bases,
        name: str,
        answers_file: JsonlWriter,
        prompts: Sequence[StudyPrompt],
        progress: Callable[[str], None],
    ):
        self.study, self.bases, self.answers_file, self.progress = study, bases, answers_file, progress
        model, tokenizer = bases(None)
        self.tokenizer = cast(PreTrainedTokenizerBase, tokenizer)
        self._base_lms: dict[str | None, LanguageModel] = {}
        self.by_key = {prompt.key: prompt for prompt in prompts}
        self.warnings: list[str] = []
        self.common = {"base": name, **study.common()}
        if (weights := weights_digest(model.config._name_or_path)) is not None:
            self.common["base_weights"] = weights
        if answers_file.truncated:
            self.warnings.append(
                f"the last line of {ANSWERS} had been cut off: it was removed and decoded again"
            )

    def of(self, cells: Sequence[Cell]) -> dict[Cell, list[Answer]]:
        """The answers of each cell by prompt and seed; what is missing is decoded.

        Raises:
            RGTGError: a model or a setting that cannot work; finished answers stay in the file.
        """
        settings = {cell: self._setting(cell) for cell in cells}
        present, foreign = self._present(settings)
        found = {}
        loaded: tuple[Any, RewardGuidedDecoder] | None = None
        for number, cell in enumerate(cells, 1):
            rows, setting = present[cell], settings[cell]
            if cell.outputs is not None:
                rows |= self._imported(cell, setting, rows)
            else:
                missing = len(self.by_key) * len(cell.seeds) - len(rows)
                at = f"[{number}/{len(cells)}] {cell.label}"
                self.progress(f"{at}: {len(rows)} answers present, {missing} to decode")
                if missing:
                    # Cells with the same models share a decoder.
                    models = (cell.model, cell.reward, cell.dtype, needs_own_cache(cell))
                    if loaded is None or loaded[0] != models:
                        loaded = models, self._decoder(cell)
                    rows |= self._decoded(cell, setting, loaded[1], rows)
            found[cell] = sorted(rows.values(), key=lambda row: (row["index"], row["seed"]))
            self._look_at(cell, found[cell])
        if foreign:
            self.warnings.append(
                f"{foreign} answers in {ANSWERS} belong to other prompts, methods or settings: left out"
            )
        return found

    def _present(self, settings: Mapping[Cell, dict[str, Any]]) -> tuple[dict[Cell, dict[Key, Answer]], int]:
        """The file's answers by cell, and how many belong to no cell."""
        places = {(cell.method, canonical(setting)): cell for cell, setting in settings.items()}
        found: dict[Cell, dict[Key, Answer]] = {cell: {} for cell in settings}
        doubled = foreign = 0
        for row in self.answers_file.rows:
            cell = places.get((row["method"], canonical(row["setting"])))
            key = self._key(row["prompt"]), row["seed"]
            seeds = () if cell is None else cell.seeds
            if (
                cell is None
                or key[0] not in self.by_key
                or (cell.outputs is None and row["seed"] not in seeds)
            ):
                foreign += 1
            elif key in found[cell]:
                doubled += 1
            else:
                # A prompt keeps its answers when its row in the prompts file changes.
                found[cell][key] = row | {"index": self.by_key[key[0]].index}
        if doubled:
            self.warnings.append(f"{doubled} answers are twice in {ANSWERS}: the first of each counts")
        return found, foreign

    def _key(self, given: Any) -> str:
        return as_prompt(given, 0, self._chat).key

    @property
    def _chat(self) -> bool:
        """Whether texts become chat messages."""
        return self.study.chat and self.tokenizer.chat_template is not None

    def _setting(self, cell: Cell) -> dict[str, Any]:
        """Everything that determines the answers of a cell, the weights of its models as digests."""
        if cell.outputs is not None:
            setting = {"outputs": cell.outputs, "sha256": _sha256(cell.outputs)}
            answers_ended = self.study.answers_ended
            return setting if answers_ended == "auto" else setting | {"answers_ended": answers_ended}
        setting = self.common | cell.setting()
        if cell.reward is not None and (weights := weights_of(cell.reward)):
            setting["weights"] = sorted(weights.values())
        if cell.model is not None and (own := weights_digest(cell.model)) is not None:
            setting["policy_weights"] = own
        return json.loads(canonical(setting))

    def _decoder(self, cell: Cell) -> RewardGuidedDecoder:
        study, dtype, pair = self.study, cell.dtype or self.study.dtype, self.bases(cell.dtype)
        if cell.model is not None and is_adapter(cell.model):
            pair = adapter_model(Adapter.load(cell.model), pair, None)
        elif cell.model is not None:
            pair = load_causal_lm(cell.model, study.device, dtype)
        return RewardGuidedDecoder.from_pretrained(
            pair, reward_of(cell), dtype=dtype, max_batch=study.batch_size, engine=study.engine
        )

    def _decoded(
        self,
        cell: Cell,
        setting: dict[str, Any],
        decoder: RewardGuidedDecoder,
        present: Mapping[Key, Answer],
    ) -> dict[Key, Answer]:
        """Decodes the missing answers in portions of two batches, so that a killed run loses at most one portion."""
        found: dict[Key, Answer] = {}
        missing, shown = len(self.by_key) * len(cell.seeds) - len(present), 0
        for some in self._portions(cell, present):
            try:
                result = decoder.generate(
                    [prompt.given for prompt, _ in some],
                    self.study.max_new_tokens,
                    cell.guidance,
                    [prompt_seed(seed, prompt.key) for prompt, seed in some],
                    list(self.study.stop) or None,
                    strategy=cell.strategy,
                )
            except RewardNaNError as error:
                raise RGTGError(f"{cell.label}, prompt {some[error.row][0].index}: {error}") from error
            except RGTGError as error:
                raise RGTGError(f"{cell.label}: {error}") from error
            costs = answer_costs(result.rows, result.stats, cell.strategy is not None)
            for (prompt, seed), row, cost in zip(some, result.rows, costs, strict=True):
                if (prompt.key, seed) in present:
                    continue
                answer = self._answer(cell, setting, prompt, seed, row) | cost
                self.answers_file.add(answer)
                found[prompt.key, seed] = answer
            if len(found) * PROGRESS_LINES // missing > shown:
                shown = len(found) * PROGRESS_LINES // missing
                speed = result.stats.tokens_per_second
                self.progress(f"{cell.label}: {len(found)} of {missing} answers, {speed:.0f} tokens/s")
        return found

    def _portions(self, cell: Cell, present: Mapping[Key, Answer]) -> Iterator[list[tuple[StudyPrompt, int]]]:
        """The portions in which an answer is missing, each complete.

        Answers share their portion's costs. A resumed run uses the same portions and decodes an unfinished one again as
        a whole, so that its numbers are those of a run that was not killed. Seeds that are new to a cell have portions
        of their own.
        """
        size, old = 2 * self.study.batch_size, {seed for _, seed in present}
        for seeds in ([s for s in cell.seeds if s in old], [s for s in cell.seeds if s not in old]):
            jobs = [(prompt, seed) for prompt in self.by_key.values() for seed in seeds]
            for start in range(0, len(jobs), size):
                some = jobs[start : start + size]
                if any((prompt.key, seed) not in present for prompt, seed in some):
                    yield some

    def _answer(
        self, cell: Cell, setting: dict[str, Any], prompt: StudyPrompt, seed: int, row: GeneratedRow
    ) -> Answer:
        base_logprob, guided_logprob = row.base_logprob, row.guided_logprob
        if cell.guidance.temperature == 0:
            guided_logprob = None
        if cell.model is not None:
            end = [] if row.end_token is None else [row.end_token]
            base_logprob = answer_logprob(self._base_lm(cell.dtype), prompt.given, row.tokens + end)
        return {
            "method": cell.method,
            "setting": setting,
            "index": prompt.index,
            "seed": seed,
            "prompt": prompt.given,
            "response": row.text,
            "tokens": len(row.tokens),
            "finish": row.finish_reason,
            "base_logprob": base_logprob,
            "guided_logprob": guided_logprob,
            "guide_reward": row.reward,
        }

    def _base_lm(self, dtype: str | None) -> LanguageModel:
        """The study's own model, from which the divergence of another policy is measured."""
        if dtype not in self._base_lms:
            base = RewardGuidedDecoder.from_pretrained(self.bases(dtype), engine=self.study.engine)
            self._base_lms[dtype] = base.lm
        return self._base_lms[dtype]

    def _imported(
        self, cell: Cell, setting: dict[str, Any], present: Mapping[Key, Answer]
    ) -> dict[Key, Answer]:
        """Answers of another program to prompts of the study; several answers to one prompt are its samples."""
        assert cell.outputs is not None
        found: dict[Key, Answer] = {}
        samples: dict[str, int] = {}
        strange = 0
        for number, row in enumerate(read_rows(cell.outputs)):
            given = row if isinstance(row, Mapping) else {}
            response = given.get("response", given.get("text"))
            if given.get("prompt") is None or not isinstance(response, str):
                why = row if isinstance(row, str) else "it needs a prompt, and a text under response"
                raise RGTGError(f"row {number} of {cell.outputs} is not an answer: {why}")
            key = self._key(
                given_prompt(given, self._chat, f"row {number} of {cell.outputs} is not an answer")
            )
            if key not in self.by_key:
                strange += 1
                continue
            seed = samples[key] = samples.get(key, -1) + 1
            if (key, seed) in present:
                continue
            text, marked = without_end(response)
            ids = cast("list[int]", self.tokenizer(text, add_special_tokens=False)["input_ids"])
            prompt = self.by_key[key]
            answer = {"method": cell.method, "setting": setting, "index": prompt.index, "seed": seed}
            answer |= {"prompt": prompt.given, "response": response, "tokens": len(ids)}
            finish = self._finish(given.get("finish_reason"), marked, f"row {number} of {cell.outputs}")
            answer |= {} if finish is None else {"finish": finish}
            self.answers_file.add(answer)
            found[key, seed] = answer
        if strange:
            self.warnings.append(f"{cell.method}: {strange} answers belong to no prompt of the study")
        return found

    def _finish(self, reason: Any, marked: bool, where: str) -> str | None:
        """How an answer of another program finished, in this package's terms; None where it is not known.

        Args:
            reason: finish reason in the row.
            marked: whether the answer's text has an end token.
            where: begins an error message.
        """
        answers_ended = self.study.answers_ended
        try:
            stated = answers_ended == "yes" if answers_ended != "auto" else marked or has_ended(reason)
        except UnusableError as error:
            raise RGTGError(f"{where}: {error}: fix it, or set answers_ended to yes or no") from error
        return None if stated is None else "eos" if stated else "length"

    def _look_at(self, cell: Cell, rows: Sequence[Answer]) -> None:
        empty = sum(not row["response"].strip() for row in rows)
        if empty:
            self.warnings.append(f"{empty} of the {len(rows)} answers of {cell.label} are empty")
        missing = len(self.by_key) - len({row["index"] for row in rows})
        if missing:
            self.warnings.append(f"{cell.label} has no answer to {missing} prompts: compared on the others")


def needs_own_cache(cell: Cell) -> bool:
    """Whether the reward model needs a cache of its own, because it appends and drops several tokens at once."""
    chunks = cell.strategy is not None and not cell.strategy.startswith("best_of_n")
    return chunks or cell.guidance.gate_entropy is not None


def reward_of(cell: Cell) -> Reward | None:
    """The reward of a cell, with a cache of its own where the strategy needs one; None for the base model alone."""
    if cell.reward is None:
        return None
    named = named_guide(cell.reward)
    if isinstance(named, SequenceReward) and needs_own_cache(cell):
        named.share_trunk = False
    return named


@torch.inference_mode()
def answer_logprob(lm: LanguageModel, given: PromptLike, answer: Sequence[int]) -> float:
    """log π(y | x) of an answer under a language model, natural logarithm.

    Args:
        lm: the language model.
        given: the prompt x as the decoder takes it.
        answer: token ids of y.
    """
    prompt = Prompt(given).ids(lm.tokenizer)
    hidden = lm.runner.hidden_uncached([*prompt, *answer])[len(prompt) - 1 : -1]
    logits = lm.runner.logits(hidden)[:, : lm.vocabulary]
    logprobs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    chosen = torch.tensor(list(answer), device=logprobs.device).unsqueeze(-1)
    return float(logprobs.gather(-1, chosen).sum())


def answer_costs(rows: Sequence[GeneratedRow], stats: Stats, strategy: bool) -> list[dict[str, float]]:
    """The cost of each answer of a call: its share of seconds and tokens, and the forwards that it took part in.

    A forward counts once for each row of its batch, so that the numbers do not depend on the batch. Shares are by
    tokens, the end-of-sequence token included. Prefills count in the seconds alone.

    Args:
        rows: rows of one call of `generate`.
        stats: stats of that call.
        strategy: whether a strategy decoded them, not token-by-token sampling.

    Returns:
        For each row `decided` (tokens, the end token included), `seconds`, `lm_calls`, `rm_calls`, `lm_tokens`,
        `rm_tokens`.
    """
    decided = [_decided(row) for row in rows]
    if rows and rows[0].alternatives is not None:
        # Best-of-n: the base model reads a sample token by token, the reward model reads it in one forward.
        reward_calls = stats.reward_calls / sum(1 + len(row.alternatives or ()) for row in rows)
        found = []
        for row, count in zip(rows, decided, strict=True):
            samples = [row, *(row.alternatives or ())]
            tokens = sum(map(_decided, samples))
            seconds = stats.seconds * tokens / stats.lm_tokens
            of_reward = {"rm_calls": reward_calls * len(samples), "rm_tokens": reward_calls * tokens}
            found.append(
                {"decided": count, "seconds": seconds, "lm_calls": tokens, "lm_tokens": tokens, **of_reward}
            )
        return found
    total = sum(decided)
    # In a strategy, a base model's forward has one token of each row, and a reward model's forward one row.
    sums = {
        "seconds": stats.seconds,
        "lm_calls": stats.lm_tokens if strategy else stats.lm_calls * total / stats.steps,
        "rm_calls": stats.reward_calls if strategy else stats.reward_calls * total / stats.steps,
        "lm_tokens": stats.lm_tokens,
        "rm_tokens": stats.reward_tokens,
    }
    return [
        {"decided": count, **{name: value * count / total for name, value in sums.items()}}
        for count in decided
    ]


def _decided(row: GeneratedRow) -> int:
    """Tokens that were decided for a row, the end-of-sequence token included."""
    return len(row.tokens) + (row.end_token is not None)


def _sha256(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise RGTGError(f"cannot read {path}: {error.strerror or error}") from error
