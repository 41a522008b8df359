"""What rounding weights to 8 or 4 bits costs and saves: `python -m benchmarks.weights`.

The embedded base model, and the bundled PARGS reward model merged into its own copy of it, in bfloat16 on the native
engine and by their own modules, and with `weights` and `reward_weights`. Writes to results/weights.csv, for each: the
rank correlation of the rewards over the k candidates of a step with those of the first, the accuracy on held-out
preferences, how many of the tokens of greedy guided answers are the first's, the bytes of both models' weights and
those that a token reads, and the time of a token. The times are taken in turn, a round of all at a time, and the best
counts.
The pairs are hh_heldout of RGTG_DATA (../shared/data by default); without them there is no accuracy.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from benchmarks.harness import MACHINE, RESULTS, append, read, same_machine, shown
from rgtg_fast import Guidance, RewardGuidedDecoder, RGTGError, SequenceReward, bundled
from rgtg_fast.bench.roofline import machine, read_bytes
from rgtg_fast.bundled import embedded
from rgtg_fast.cli.session import quiet
from rgtg_fast.evaluation.accuracy import score_pairs, verdicts, wilson
from rgtg_fast.training.data import load_pairs, tokenize_pairs

# Weights of the base model and of the reward model, None for those of their files, and the engine. The first is what
# the others are compared with. The second differs from it in rounding alone: what two engines make of the same weights.
VARIANTS = (
    (None, None, "auto"),
    (None, None, "transformers"),
    (None, "int8", "auto"),
    ("int8", "int8", "auto"),
    (None, "int4", "auto"),
)
PROMPTS = (
    "How do I learn to swim?",
    "What should I cook for two friends tonight?",
    "Explain why the sky is blue.",
    "My neighbor is too loud. What can I do?",
    "Write a short poem about rain.",
    "How can I sleep better?",
)
K, TOKENS = 10, 24
GREEDY = Guidance(K, 1.0, temperature=0)
COLUMNS = (
    "date",
    *MACHINE,
    "lm",
    "guide",
    "weights",
    "reward_weights",
    "engine",
    "weight_bytes",
    "bytes_per_token",
    "tokens_per_second",
    "cpu_ms_per_token",
    "steps",
    "k",
    "rank_correlation",
    "tokens",
    "equal_tokens",
    "data",
    "pairs",
    "max_length",
    "accuracy",
    "ci95_low",
    "ci95_high",
    "equal_verdicts",
)


def chats() -> list[Any]:
    """The prompts as chats."""
    return [[{"role": "user", "content": text}] for text in PROMPTS]


def rewards_of(decoder: RewardGuidedDecoder) -> list[list[tuple[int, dict[int, float | None]]]]:
    """For each prompt and each step of its greedy unguided answer: the token, and the rewards of the k candidates."""
    rows = decoder.generate(chats(), TOKENS, Guidance(K, beta=0.0, temperature=0), trace=True)
    return [
        [(step.token, {each.token: each.reward for each in step.candidates}) for step in row.trace or ()]
        for row in rows
    ]


def rank_correlations(one: list[list[Any]], other: list[list[Any]]) -> list[float]:
    """Spearman's correlation of the rewards of a step, for the steps after equal tokens and with equal candidates."""
    found = []
    for left, right in zip(one, other, strict=True):
        for (token, rewards), (other_token, others) in zip(left, right, strict=False):
            if rewards.keys() == others.keys():
                own: Any = spearmanr(list(rewards.values()), [others[key] for key in rewards])
                found.append(float(own.statistic))
            if token != other_token:
                break
    return found


def answers_of(decoder: RewardGuidedDecoder) -> list[list[int]]:
    """Greedy guided answers."""
    return [row.tokens for row in decoder.generate(chats(), TOKENS, GREEDY)]


def times_of(decoder: RewardGuidedDecoder) -> tuple[float, float]:
    """Milliseconds for a token of one row, and those of a processor, which leave out what the machine does besides.

    The prefill is left out.
    """
    chunks = decoder.stream(chats()[0], TOKENS, GREEDY, trace=False)
    next(chunks)
    clock, processor = time.perf_counter(), time.process_time()
    count = sum(1 for _ in chunks)
    return 1000 * (time.perf_counter() - clock) / count, 1000 * (time.process_time() - processor) / count


def best_times(decoders: list[RewardGuidedDecoder], rounds: int) -> list[tuple[float, float]]:
    """Each decoder's best times of some rounds, in each of which every decoder has a turn."""
    taken = [[times_of(decoder) for decoder in decoders] for _ in range(rounds)]
    return [(min(wall for wall, _ in own), min(cpu for _, cpu in own)) for own in zip(*taken, strict=True)]


def models_of(decoder: RewardGuidedDecoder) -> list[Any]:
    """The base model and the reward model."""
    assert decoder.reward is not None
    (runner,) = decoder.reward.models()
    return [decoder.lm.runner.model, runner.model]


def weight_bytes(models: list[Any]) -> int:
    """Bytes of the models' weights and buffers."""
    tensors = {id(x): x for model in models for x in (*model.parameters(), *model.buffers())}
    return sum(x.nbytes for x in tensors.values())


def equal_tokens(one: list[list[int]], other: list[list[int]]) -> int:
    """Tokens before the first difference, over all answers."""
    count = 0
    for left, right in zip(one, other, strict=True):
        for a, b in zip(left, right, strict=False):
            if a != b:
                break
            count += 1
    return count


class Preferences:
    """Held-out preference pairs.

    Args:
        path: of the pairs.
        tokenizer: the base model's.
        limit: pairs to take.
        max_length: tokens of a prompt and its longer answer; longer pairs are left out.
    """

    def __init__(self, path: Path, tokenizer: Any, limit: int, max_length: int):
        self.name, self.max_length = path.name.partition(".")[0], max_length
        pairs, _ = load_pairs(str(path), "auto", chat=True)
        tokenized, _ = tokenize_pairs(pairs, tokenizer, max_length, chat=True)
        self.pairs = tokenized[:limit]
        texts: dict[int, Any] = {pair.index: pair.prompt for pair in pairs}
        prompts = [texts[pair.index] for pair in self.pairs]
        self.prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]

    def verdicts(self, decoder: RewardGuidedDecoder) -> list[float]:
        """For each pair, 1 where the chosen answer has the higher reward."""
        assert decoder.reward is not None
        with torch.inference_mode():
            return verdicts(score_pairs(decoder.reward, self.pairs, prompts=self.prompts), 1.0)


def decoder_of(
    base: str, weights: str | None, reward_weights: str | None, engine: str
) -> RewardGuidedDecoder:
    """The bundled reward model beside the base model."""
    reward = SequenceReward(bundled.PREFIX + "pargs", share_trunk=False, weights=reward_weights)
    return RewardGuidedDecoder.from_pretrained(
        base, reward, device="cpu", dtype="bfloat16", engine=engine, max_length=1024, weights=weights
    )


def measure(base: str, preferences: Path, limit: int, max_length: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each variant."""
    decoders = [decoder_of(base, *variant) for variant in VARIANTS]
    pairs = None
    if preferences.is_file():
        pairs = Preferences(preferences, decoders[0].tokenizer, limit, max_length)
    else:
        print(f"no accuracy: {preferences.name} is not in RGTG_DATA", file=sys.stderr)
    times, rows, first = best_times(decoders, rounds), [], {}
    for decoder, (wall, processor) in zip(decoders, times, strict=True):
        described = decoder.describe()
        answers = answers_of(decoder)
        found: dict[str, Any] = {"rewards": rewards_of(decoder), "answers": answers}
        if pairs is not None:
            found["verdicts"] = pairs.verdicts(decoder)
        first = first or found
        ranks = rank_correlations(first["rewards"], found["rewards"])
        models = models_of(decoder)
        row = {
            "guide": bundled.PREFIX + "pargs",
            "weights": described["lm_quantization"] or described["dtype"],
            "reward_weights": described["reward_quantization"] or described["dtype"],
            "engine": described["reward_engine"],
            "weight_bytes": weight_bytes(models),
            "bytes_per_token": sum(map(read_bytes, models)),
            "tokens_per_second": round(1000 / wall, 2),
            "cpu_ms_per_token": round(processor, 3),
            "steps": len(ranks),
            "k": K,
            "rank_correlation": round(sum(ranks) / len(ranks), 4),
            "tokens": sum(map(len, first["answers"])),
            "equal_tokens": equal_tokens(first["answers"], answers),
        }
        if pairs is not None:
            own, count = found["verdicts"], len(found["verdicts"])
            low, high = wilson(sum(own), count)
            row |= {"data": pairs.name, "pairs": count, "max_length": pairs.max_length}
            row |= {"accuracy": sum(own) / count, "ci95_low": low, "ci95_high": high}
            row["equal_verdicts"] = sum(a == b for a, b in zip(first["verdicts"], own, strict=True))
        print(
            f"{row['weights']} and {row['reward_weights']}, {row['engine']}: {row['tokens_per_second']} tokens/s"
        )
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="preference pairs (default: hh_heldout of RGTG_DATA)")
    parser.add_argument("--limit", type=int, default=32, help="pairs at most")
    parser.add_argument(
        "--max-length", type=int, default=128, help="tokens of a prompt and its longer answer"
    )
    parser.add_argument("--rounds", type=int, default=10, help="how often the times of all are taken")
    parser.add_argument("--output", type=Path, default=RESULTS / "weights.csv")
    given = parser.parse_args(arguments)
    quiet()
    folder = Path(os.environ.get("RGTG_DATA") or Path(__file__).parents[2] / "shared" / "data")
    path = given.data or folder / "hh_heldout.jsonl.gz"
    try:
        base = str(embedded.default_model(print))
        facts = {"date": datetime.date.today().isoformat(), **machine(), "lm": embedded.NAME}
        measured = measure(base, path, given.limit, given.max_length, given.rounds)
        rows = [facts | row for row in measured]
    except RGTGError as error:
        print(error, file=sys.stderr)
        return 2
    # New rows replace those of the same machine.
    kept = [row for row in read(given.output) if not same_machine(row, facts)]
    given.output.unlink(missing_ok=True)
    new = [{name: shown(row.get(name)) for name in COLUMNS} for row in rows]
    append(given.output, [*kept, *new], COLUMNS)
    print(f"{len(rows)} rows: {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
