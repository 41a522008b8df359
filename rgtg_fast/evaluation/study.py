"""Runs a study: prompts × methods × settings × seeds are decoded, judged and summed up, and nothing is done twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from rgtg_fast.decoding.decoder import RewardGuidedDecoder
from rgtg_fast.decoding.results import GeneratedRow, Stats
from rgtg_fast.errors import RewardNaNError, RGTGError
from rgtg_fast.evaluation.journal import Journal
from rgtg_fast.evaluation.judge import Judge, conflicts, fingerprint, weights_of
from rgtg_fast.evaluation.settings import Cell, Study, canonical
from rgtg_fast.models.adapter import Adapter, is_adapter
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.loading import ModelAndTokenizer, adapter_model, load_causal_lm
from rgtg_fast.models.prompts import Prompt, PromptLike
from rgtg_fast.rewards import SequenceReward, named_guide
from rgtg_fast.rewards.base import Reward
from rgtg_fast.training.data import hh_messages, read_rows

ANSWERS, SCORES, CONFIG = "answers.jsonl", "scores.jsonl", "config.yaml"
Say = Callable[[str], None]


@dataclass(frozen=True)
class StudyPrompt:
    """One prompt of a study.

    Attributes:
        index: row of the file. given: as the decoder takes it. text: to be read. key: what makes it this prompt.
    """

    index: int
    given: PromptLike
    text: str
    key: str


@dataclass
class Results:
    """Everything a study found.

    Attributes:
        study: its settings. base: name of the base model. prompts: those that were answered.
        answers: rows of answers.jsonl of each cell, in the order of `study.cells()`.
        scores: judge → cell → (prompt index, seed) → reward.
        warnings: what a reader has to know before the numbers.
    """

    study: Study
    base: str
    prompts: list[StudyPrompt]
    answers: dict[Cell, list[dict[str, Any]]] = field(default_factory=dict)
    scores: dict[str, dict[Cell, dict[tuple[int, int], float]]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def run_study(
    study: Study,
    source: str | ModelAndTokenizer | None = None,
    base_name: str | None = None,
    say: Say = lambda message: None,
) -> Results:
    """Decodes what is missing, judges what is not judged yet, and returns everything.

    Args:
        study: the settings.
        source: what to load as the base model where it is not `study.model`.
        base_name: the base model's name in the results, `study.model` by default.
        say: receives lines about the progress.

    Returns:
        The results; `rgtg_fast.evaluation.report.write_report` makes tables and pages of them.

    Raises:
        RGTGError: a setting, a file or a model that cannot work; what was finished before stays in the output folder.
    """
    given = source if source is not None else study.model
    if given is None:
        raise RGTGError("the study names no model: set model to a path or hub id")
    name = base_name or study.model or "the base model"
    folder = Path(study.output)
    cells = study.cells()
    _keep_config(study, folder)
    base = load_causal_lm(given, study.device, study.dtype)
    if base[1] is None:
        raise RGTGError(f"the model {name} came without a tokenizer: a study needs texts")
    prompts, warnings = load_prompts(study, base[1])
    results = Results(study, name, prompts, warnings=warnings)
    guides = [cell.reward for cell in cells if cell.reward is not None]
    # First, so that it stands before everything else.
    results.warnings[:0] = conflicts(dict(study.judges), guides)
    with Journal(folder / ANSWERS, ("method", "setting", "index", "seed", "prompt", "response")) as journal:
        _Decoding(study, base, name, journal, results, say).run(cells)
    with Journal(folder / SCORES, ("method", "setting", "index", "seed", "judge", "reward")) as journal:
        _Judging(study, base, journal, results, say).run(cells)
    return results


def load_prompts(study: Study, tokenizer: PreTrainedTokenizerBase) -> tuple[list[StudyPrompt], list[str]]:
    """The prompts of a study as the decoder takes them, and what is wrong with them in one line each.

    Duplicates and empty prompts are left out. Prompts in HH-RLHF's turns become chat messages.

    Raises:
        RGTGError: no such file, a row without a prompt, or no prompt left.
    """
    rows: Any = (
        ({"prompt": text} for text in study.prompts)
        if isinstance(study.prompts, tuple)
        else read_rows(study.prompts)
    )
    chat = study.chat and tokenizer.chat_template is not None
    found: dict[str, StudyPrompt] = {}
    empty = duplicates = 0
    for index, row in enumerate(rows):
        value = row.get("prompt") if isinstance(row, Mapping) else None
        if value is None:
            why = row if isinstance(row, str) else "it has no field 'prompt'"
            raise RGTGError(f"row {index} of {_source(study)} is no prompt: {why}")
        prompt = _prompt(value, index, chat)
        if not prompt.text.strip():
            empty += 1
        elif prompt.key in found:
            duplicates += 1
        else:
            found[prompt.key] = prompt
        if len(found) == study.limit:
            break
    if not found:
        raise RGTGError(f"{_source(study)} has no prompts: name a file with a field 'prompt'")
    warnings = []
    if duplicates:
        warnings.append(f"{duplicates} duplicate prompts were left out")
    if empty:
        warnings.append(f"{empty} empty prompts were left out")
    return list(found.values()), warnings


def _source(study: Study) -> str:
    return study.prompts if isinstance(study.prompts, str) else "prompts"


def _prompt(value: Any, index: int, chat: bool) -> StudyPrompt:
    messages = (
        value if isinstance(value, list) else hh_messages(value) if isinstance(value, str) and chat else None
    )
    if messages is None and chat:
        messages = [{"role": "user", "content": str(value)}]
    if messages is None:
        return StudyPrompt(index, str(value), str(value), str(value))
    try:
        text = "\n\n".join(str(message["content"]) for message in messages)
    except (TypeError, KeyError) as error:
        raise RGTGError(
            f"prompt {index} is neither a text nor chat messages with role and content"
        ) from error
    return StudyPrompt(index, messages, text, json.dumps(messages, ensure_ascii=False, sort_keys=True))


def _keep_config(study: Study, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(study.as_yaml(), encoding="utf-8")
    except OSError as error:
        raise RGTGError(f"cannot write to {folder}: {error.strerror or error}") from error


def sample_seed(seed: int, key: str) -> int:
    """The decoder's seed for one prompt: the same for every method, and another for every prompt.

    Methods are compared under the same noise; prompts, over which the intervals are resampled, do not share it.
    """
    digest = hashlib.sha256(f"{seed} {key}".encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


class _Decoding:
    """Answers every prompt with every cell, and reads the answers that are there."""

    def __init__(
        self, study: Study, base: ModelAndTokenizer, name: str, journal: Journal, results: Results, say: Say
    ):
        self.study, self.base, self.journal, self.results, self.say = study, base, journal, results, say
        assert base[1] is not None
        self.tokenizer = base[1]
        self.common = {"base": name, **study.common()}
        loaded = base[0].config._name_or_path
        if (weights := fingerprint(loaded)) is not None:
            self.common["base_weights"] = weights

    def run(self, cells: Sequence[Cell]) -> None:
        """Decodes what is missing, cell by cell."""
        if self.journal.truncated:
            self.results.warnings.append(
                f"the last line of {ANSWERS} had been cut off: it was removed and decoded again"
            )
        settings = {cell: self._setting(cell) for cell in cells}
        present = self._present()
        by_key = {prompt.key: prompt for prompt in self.results.prompts}
        counted = 0
        decoders: dict[tuple[Any, ...], RewardGuidedDecoder] = {}
        for number, cell in enumerate(cells, 1):
            where = (cell.method, canonical(settings[cell]))
            rows = {
                (key, seed): row
                for (method, setting, key, seed), row in present.items()
                if (method, setting) == where
            }
            counted += len(rows)
            wanted = {key: row for key, row in rows.items() if key[0] in by_key}
            for (key, _), row in wanted.items():
                row["index"] = by_key[key].index
            if cell.outputs is not None:
                wanted |= self._imported(cell, settings[cell], set(wanted))
            else:
                jobs = [(p, s) for p in self.results.prompts for s in cell.seeds if (p.key, s) not in wanted]
                self.say(
                    f"[{number}/{len(cells)}] {cell.label}: {len(wanted)} answers present, {len(jobs)} to decode"
                )
                if jobs:
                    # The decoder of the cell before is kept where only its settings differ.
                    use = (cell.model, cell.reward, _needs_own_cache(cell))
                    if use not in decoders:
                        decoders = {use: self._decoder(cell)}
                    wanted |= self._decoded(cell, settings[cell], decoders[use], jobs)
            seeds = set(cell.seeds)
            kept = [row for row in wanted.values() if cell.outputs is not None or row["seed"] in seeds]
            self.results.answers[cell] = sorted(kept, key=lambda row: (row["index"], row["seed"]))
        self._warn(cells, len(present) - counted)

    def _present(self) -> dict[tuple[str, str, str, int], dict[str, Any]]:
        found: dict[tuple[str, str, str, int], dict[str, Any]] = {}
        doubled = 0
        for row in self.journal.rows:
            key = (row["method"], canonical(row["setting"]), self._key(row["prompt"]), row["seed"])
            doubled += key in found
            found.setdefault(key, row)
        if doubled:
            self.results.warnings.append(
                f"{doubled} answers are twice in {ANSWERS}: the first of each was taken"
            )
        return found

    def _key(self, given: Any) -> str:
        return _prompt(given, 0, self.study.chat and self.tokenizer.chat_template is not None).key

    def _setting(self, cell: Cell) -> dict[str, Any]:
        """Everything that decides the answers of a cell, the weights of its models by fingerprint."""
        setting = self.common | cell.setting()
        if cell.outputs is not None:
            return {"outputs": cell.outputs, "sha256": _sha256(cell.outputs)}
        if cell.reward is not None and (weights := weights_of(cell.reward)):
            setting["weights"] = sorted(weights.values())
        if cell.model is not None and (own := fingerprint(cell.model)) is not None:
            setting["policy_weights"] = own
        return json.loads(canonical(setting))

    def _decoder(self, cell: Cell) -> RewardGuidedDecoder:
        self.say(f"loading {cell.method}")
        study, pair = self.study, self.base
        if cell.model is not None:
            pair = _policy(cell.model, self.base, study)
        return RewardGuidedDecoder.from_pretrained(
            pair, _guide(cell), dtype=study.dtype, max_batch=study.batch_size, engine=study.engine
        )

    def _decoded(
        self,
        cell: Cell,
        setting: dict[str, Any],
        decoder: RewardGuidedDecoder,
        jobs: Sequence[tuple[StudyPrompt, int]],
    ) -> dict[tuple[str, int], dict[str, Any]]:
        """Decodes in portions of a few batches: a killed run loses at most one portion."""
        found = {}
        portion = 2 * self.study.batch_size
        for start in range(0, len(jobs), portion):
            some = jobs[start : start + portion]
            try:
                result = decoder.generate(
                    [prompt.given for prompt, _ in some],
                    self.study.max_new_tokens,
                    cell.guidance,
                    [sample_seed(seed, prompt.key) for prompt, seed in some],
                    list(self.study.stop) or None,
                    strategy=cell.strategy,
                )
            except RewardNaNError as error:
                raise RGTGError(f"{cell.label}, prompt {some[error.row][0].index}: {error}") from error
            except RGTGError as error:
                raise RGTGError(f"{cell.label}: {error}") from error
            costs = answer_costs(result.rows, result.stats, cell.strategy is not None)
            for (prompt, seed), row, cost in zip(some, result.rows, costs, strict=True):
                found[prompt.key, seed] = self._written(cell, setting, prompt, seed, row, cost)
            done = start + len(some)
            self.say(f"{cell.label}: {done} of {len(jobs)}, {result.stats.tokens_per_second:.0f} tokens/s")
        return found

    def _written(
        self,
        cell: Cell,
        setting: dict[str, Any],
        prompt: StudyPrompt,
        seed: int,
        row: GeneratedRow,
        cost: dict[str, float],
    ) -> dict[str, Any]:
        base_logprob = row.base_logprob
        drawn = row.guided_logprob if cell.strategy is None and cell.guidance.temperature > 0 else None
        if cell.model is not None and drawn is not None:
            end = [] if row.end_token is None else [row.end_token]
            base_logprob = answer_logprob(self._base_lm(), prompt.given, row.tokens + end)
        answer = {
            "method": cell.method,
            "setting": setting,
            "index": prompt.index,
            "seed": seed,
            "prompt": prompt.given,
            "response": row.text,
            "tokens": len(row.tokens),
            "finish": row.finish_reason,
            **cost,
            "base_logprob": base_logprob,
            "guided_logprob": drawn,
            "guide_reward": row.reward,
        }
        self.journal.add(answer)
        return answer

    def _base_lm(self) -> LanguageModel:
        """The study's own model, for the divergence of another policy from it."""
        decoder = RewardGuidedDecoder.from_pretrained(
            self.base, dtype=self.study.dtype, engine=self.study.engine
        )
        return decoder.lm

    def _imported(
        self, cell: Cell, setting: dict[str, Any], present: set[tuple[str, int]]
    ) -> dict[tuple[str, int], dict[str, Any]]:
        """Answers of another program: those to prompts of the study, several of one prompt as its samples."""
        assert cell.outputs is not None
        by_key = {prompt.key: prompt for prompt in self.results.prompts}
        found: dict[tuple[str, int], dict[str, Any]] = {}
        samples: dict[str, int] = {}
        strange = 0
        for number, row in enumerate(read_rows(cell.outputs)):
            response = None
            if isinstance(row, Mapping):
                response = row.get("response", row.get("text"))
            if not isinstance(row, Mapping) or row.get("prompt") is None or not isinstance(response, str):
                why = row if isinstance(row, str) else "it has no prompt, or no text under response"
                raise RGTGError(f"{cell.outputs}: row {number} is no answer: {why}")
            key = self._key(row["prompt"])
            if key not in by_key:
                strange += 1
                continue
            seed = samples[key] = samples.get(key, -1) + 1
            if (key, seed) in present:
                continue
            ids = cast("list[int]", self.tokenizer(response, add_special_tokens=False)["input_ids"])
            answer = {
                "method": cell.method,
                "setting": setting,
                "index": by_key[key].index,
                "seed": seed,
                "prompt": by_key[key].given,
                "response": response,
                "tokens": len(ids),
            }
            self.journal.add(answer)
            found[key, seed] = answer
        if strange:
            self.results.warnings.append(f"{cell.method}: {strange} answers belong to no prompt of the study")
        return found

    def _warn(self, cells: Sequence[Cell], foreign: int) -> None:
        warnings = self.results.warnings
        for cell in cells:
            rows = self.results.answers[cell]
            empty = sum(not row["response"].strip() for row in rows)
            if empty:
                warnings.append(f"{empty} of {len(rows)} answers of {cell.label} are empty")
            missing = len(self.results.prompts) - len({row["index"] for row in rows})
            if missing:
                warnings.append(f"{cell.label} has no answer to {missing} prompts: compared on the others")
        if foreign > 0:
            warnings.append(f"{foreign} answers in {ANSWERS} belong to other methods or settings: left out")


def _needs_own_cache(cell: Cell) -> bool:
    """Whether the guide has to grow and shrink by chunks, which one in the base model's forward cannot."""
    chunks = cell.strategy is not None and not cell.strategy.startswith("best_of_n")
    return chunks or cell.guidance.gate_entropy is not None


def _guide(cell: Cell) -> Reward | None:
    if cell.reward is None:
        return None
    guide = named_guide(cell.reward)
    if isinstance(guide, SequenceReward) and _needs_own_cache(cell):
        guide.share_trunk = False
    return guide


def _policy(folder: str, base: ModelAndTokenizer, study: Study) -> ModelAndTokenizer:
    """Another policy than the study's model: a whole model, or an adapter merged into a copy of its base."""
    if is_adapter(folder):
        model, tokenizer = adapter_model(Adapter.load(folder), base, None)
        return model, tokenizer
    return load_causal_lm(folder, study.device, study.dtype)


@torch.inference_mode()
def answer_logprob(lm: LanguageModel, given: PromptLike, answer: Sequence[int]) -> float:
    """log π(y | x) of an answer under a language model, natural logarithm.

    Args:
        given: the prompt as the decoder takes it. answer: token ids.
    """
    prompt = Prompt(given).ids(lm.tokenizer)
    hidden = lm.backbone.hidden_uncached([*prompt, *answer])[len(prompt) - 1 : -1]
    logits = lm.backbone.logits(hidden)[:, : lm.vocabulary]
    logprobs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    chosen = torch.tensor(list(answer), device=logprobs.device).unsqueeze(-1)
    return float(logprobs.gather(-1, chosen).sum())


def answer_costs(rows: Sequence[GeneratedRow], stats: Stats, strategy: bool) -> list[dict[str, float]]:
    """What each answer of a call cost: its share of seconds and tokens, and the forwards it took part in.

    A forward serves all rows of the batch; it counts once for each of them, so that the numbers do not depend on the
    batch. Shares are by tokens, the end-of-sequence token included. Prefills are in the seconds alone.

    Args:
        rows: of one call of `generate`. stats: of that call. strategy: not decoded token by token.
    """
    decided = [len(row.tokens) + (row.end_token is not None) for row in rows]
    total = sum(decided)
    # A strategy's guide runs row by row, and its base model one token a row.
    lm_calls = stats.lm_tokens if strategy else stats.lm_calls * total / stats.steps
    rm_calls = stats.reward_calls if strategy else stats.reward_calls * total / stats.steps
    sums = {
        "lm_calls": lm_calls,
        "rm_calls": rm_calls,
        "lm_tokens": stats.lm_tokens,
        "rm_tokens": stats.reward_tokens,
        "seconds": stats.seconds,
    }
    return [
        {"decided": count, **{name: value * count / total for name, value in sums.items()}}
        for count in decided
    ]


class _Judging:
    """Rates every answer with every judge, and reads the ratings that are there."""

    def __init__(self, study: Study, base: ModelAndTokenizer, journal: Journal, results: Results, say: Say):
        self.study, self.base, self.journal, self.results, self.say = study, base, journal, results, say

    def run(self, cells: Sequence[Cell]) -> None:
        """Rates what is not rated yet, judge by judge."""
        if self.journal.truncated:
            self.results.warnings.append(
                f"the last line of {SCORES} had been cut off: it was removed and judged again"
            )
        for name, source in self.study.judges.items():
            told = {"judge": name, "model": source, "weights": sorted(weights_of(source).values())}
            known, present = self._present(told)
            answers = [(cell, row, _identity(row)) for cell in cells for row in self.results.answers[cell]]
            missing = [entry for entry in answers if _place(entry[1], entry[2]) not in present]
            texts = {identity: row for _, row, identity in missing if identity not in known}
            self.say(
                f"judge {name}: {len(answers) - len(missing)} ratings present, {len(texts)} texts to rate"
            )
            self._add(told, [entry for entry in missing if entry[2] in known], known)
            by_text: dict[str, list[tuple[Cell, dict[str, Any], str]]] = {}
            for entry in missing:
                by_text.setdefault(entry[2], []).append(entry)
            for identity, reward in self._rated(source, texts):
                known[identity] = reward
                self._add(told, by_text[identity], known)
            self.results.scores[name] = {
                cell: {
                    (row["index"], row["seed"]): known[_identity(row)] for row in self.results.answers[cell]
                }
                for cell in cells
            }

    def _present(self, told: dict[str, Any]) -> tuple[dict[str, float], set[tuple[str, str, int, str]]]:
        """The rewards of one judge by the identity of the text, and which answers have theirs written down."""
        known: dict[str, float] = {}
        present = set()
        for row in self.journal.rows:
            if all(row.get(name) == value for name, value in told.items()):
                known.setdefault(row["answer"], row["reward"])
                present.add(_place(row, row["answer"]))
        return known, present

    def _rated(self, source: str, texts: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, float]]:
        """Identity and reward of each text."""
        if not texts:
            return
        judge = Judge(source, self.base, self.study.dtype)
        identities = list(texts)
        prompts = [texts[identity]["prompt"] for identity in identities]
        responses = [texts[identity]["response"] for identity in identities]
        step = max(1, len(identities) // _PROGRESS_LINES)
        for done, (index, reward) in enumerate(judge.rate(prompts, responses), 1):
            if done % step == 0:
                self.say(f"judge {source}: {done} of {len(identities)} rated")
            yield identities[index], reward

    def _add(
        self,
        told: dict[str, Any],
        entries: Sequence[tuple[Cell, dict[str, Any], str]],
        known: dict[str, float],
    ) -> None:
        for _, row, identity in entries:
            place = {name: row[name] for name in ("method", "setting", "index", "seed")}
            self.journal.add({**place, **told, "answer": identity, "reward": known[identity]})


# Lines about the progress of one judge.
_PROGRESS_LINES = 10


def _identity(row: Mapping[str, Any]) -> str:
    """What a judge reads of an answer, as a hash: a text that comes twice is rated once."""
    read = json.dumps([row["prompt"], row["response"]], sort_keys=True)
    return hashlib.sha256(read.encode()).hexdigest()[:24]


def _place(row: Mapping[str, Any], identity: str) -> tuple[str, str, int, str]:
    return row["method"], canonical(row["setting"]), row["seed"], identity


def _sha256(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise RGTGError(f"cannot read {path}: {error.strerror or error}") from error
