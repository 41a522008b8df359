"""What rounding a reward model's weights to 4 bits costs and saves: `python -m benchmarks.int4`.

The bundled PARGS reward model, merged into its own copy of the embedded base model, in bfloat16 on the native engine
and by its own modules, and with `weights="int4"`. Writes to results/int4.csv, for each: the rank correlation of its
rewards over the k candidates of a step with those of the first, its accuracy on held-out preferences, how many of the
tokens of greedy guided answers are the first's, the bytes of its weights, and the time of a token on a processor. The
pairs are hh_heldout of RGTG_DATA (../shared/data by default); without them there is no accuracy.
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
from rgtg_fast.bench.roofline import machine
from rgtg_fast.bundled import embedded
from rgtg_fast.cli.session import quiet
from rgtg_fast.evaluation.accuracy import score_pairs, verdicts, wilson
from rgtg_fast.models.loading import ModelAndTokenizer, load_causal_lm
from rgtg_fast.training.data import load_pairs, tokenize_pairs

# (weights, engine, arguments): the first is what the others are compared with. The second differs from it in rounding
# alone: what two engines make of the same weights.
VARIANTS = (
    ("bfloat16", "auto", None),
    ("bfloat16", "transformers", None),
    ("int4", "auto", "int4"),
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
COLUMNS = (
    "date",
    *MACHINE,
    "lm",
    "guide",
    "weights",
    "engine",
    "weight_bytes",
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


def answers_of(decoder: RewardGuidedDecoder) -> tuple[list[list[int]], float]:
    """Greedy guided answers, and the milliseconds of a processor for a token of one row, the best of three.

    The prefill is left out, and so is what the machine does besides.
    """
    greedy, best = Guidance(K, 1.0, temperature=0), float("inf")
    for _ in range(3):
        chunks = decoder.stream(chats()[0], TOKENS, greedy, trace=False)
        next(chunks)
        begun = time.process_time()
        count = sum(1 for _ in chunks)
        best = min(best, 1000 * (time.process_time() - begun) / count)
    return [row.tokens for row in decoder.generate(chats(), TOKENS, greedy)], best


def weight_bytes(decoder: RewardGuidedDecoder) -> int:
    """Bytes of the reward model's weights and buffers."""
    assert decoder.reward is not None
    (runner,) = decoder.reward.models()
    tensors = {id(x): x for x in (*runner.model.parameters(), *runner.model.buffers())}
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


def measure(base: ModelAndTokenizer, preferences: Preferences | None) -> list[dict[str, Any]]:
    """A row for each variant."""
    rows, first = [], {}
    for name, engine, weights in VARIANTS:
        print(f"{name}, engine={engine}", flush=True)
        reward = SequenceReward(bundled.PREFIX + "pargs", share_trunk=False, weights=weights)
        decoder = RewardGuidedDecoder.from_pretrained(base, reward, engine=engine, max_length=1024)
        described = decoder.describe()
        answers, milliseconds = answers_of(decoder)
        found: dict[str, Any] = {"rewards": rewards_of(decoder), "answers": answers}
        if preferences is not None:
            found["verdicts"] = preferences.verdicts(decoder)
        first = first or found
        ranks = rank_correlations(first["rewards"], found["rewards"])
        row = {
            "guide": bundled.PREFIX + "pargs",
            "weights": described["reward_quantization"] or described["dtype"],
            "engine": described["reward_engine"],
            "weight_bytes": weight_bytes(decoder),
            "cpu_ms_per_token": round(milliseconds, 3),
            "steps": len(ranks),
            "k": K,
            "rank_correlation": round(sum(ranks) / len(ranks), 4),
            "tokens": sum(map(len, first["answers"])),
            "equal_tokens": equal_tokens(first["answers"], answers),
        }
        if preferences is not None:
            own, count = found["verdicts"], len(found["verdicts"])
            low, high = wilson(sum(own), count)
            row |= {"data": preferences.name, "pairs": count, "max_length": preferences.max_length}
            row |= {"accuracy": sum(own) / count, "ci95_low": low, "ci95_high": high}
            row["equal_verdicts"] = sum(a == b for a, b in zip(first["verdicts"], own, strict=True))
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="preference pairs (default: hh_heldout of RGTG_DATA)")
    parser.add_argument("--limit", type=int, default=32, help="pairs at most")
    parser.add_argument(
        "--max-length", type=int, default=128, help="tokens of a prompt and its longer answer"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "int4.csv")
    given = parser.parse_args(arguments)
    quiet()
    folder = Path(os.environ.get("RGTG_DATA") or Path(__file__).parents[2] / "shared" / "data")
    path, preferences = given.data or folder / "hh_heldout.jsonl.gz", None
    try:
        base = load_causal_lm(str(embedded.default_model(print)), "cpu", "bfloat16")
        if path.is_file():
            preferences = Preferences(path, base[1], given.limit, given.max_length)
        else:
            print(f"no accuracy: {path.name} is not in RGTG_DATA", file=sys.stderr)
        facts = {"date": datetime.date.today().isoformat(), **machine(), "lm": embedded.NAME}
        rows = [facts | row for row in measure(base, preferences)]
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
