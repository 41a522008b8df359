"""What a token of every method costs, counted where tokens enter the models, is what the table of methods says."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import method_costs
from benchmarks.harness import RESULTS, read
from benchmarks.method_costs import OTHERS, OWN, SHARED, Case, Parts, cases, measure, measure_strategy
from benchmarks.report import methods as method_tables
from rgtg_fast import RGTGError
from rgtg_fast.engine.strategies.sampler import Sampler
from rgtg_fast.methods import METHODS, STRATEGIES
from rgtg_fast.models.loading import load_causal_lm
from tests.conftest import make_lm, make_tokenizer
from tests.covering import daily, each

pytest.importorskip("peft", reason="adapters are written by peft (the train extra)")

ROOT = Path(__file__).parents[2]
K, STEPS = 5, 4
# For B rows and k candidates: forwards a step and tokens a token of the base model, then of the guide.
EXPECTED = {
    ("unguided", "–"): (1, 1, 0, 0),
    **dict.fromkeys(((name, OWN) for name in ("pargs", "args", "cd-fudge", "rad")), (1, 1, 1, K)),
    ("text", OTHERS["text"]): (1, 1, 1, K),
    **dict.fromkeys(((name, OWN) for name in ("farma", "genarm")), (1, 1, 1, 1)),
    ("eft", OWN): (1, 1, 2, 2),
    ("contrastive", OTHERS["contrastive"]): (1, 3, 0, 0),
    ("function", OTHERS["function"]): (1, 1, 1, K),
    ("mixture of contrastive and pargs", OWN): (1, 3, 1, K),
    **dict.fromkeys(((name, SHARED) for name in ("pargs", "args", "cd-fudge", "rad")), (1, K, 0, K)),
    **dict.fromkeys(((name, SHARED) for name in ("farma", "genarm")), (1, 1, 0, 1)),
    ("eft", SHARED): (1, 1, 0, 2),
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    base: Any = make_lm(num_hidden_layers=3)
    return Parts(base, make_tokenizer(), tmp_path_factory.mktemp("adapters"))


def case(parts: Parts, name: str, guide: str) -> Case:
    (found,) = (c for c in cases(parts, K) if (c.method, c.guide) == (name, guide))
    return found


def test_every_method_is_counted(parts: Parts) -> None:
    counted = {(c.method, c.guide) for c in cases(parts, K)}
    assert counted == set(EXPECTED)
    assert {name.partition(" ")[0] for name, _ in counted} - {"unguided"} == {
        method.name for method in METHODS
    }


@pytest.mark.parametrize("engine", ["auto", "transformers"])
@pytest.mark.parametrize(("name", "guide"), EXPECTED, ids=lambda value: value.replace(" ", "-"))
def test_a_token_costs_what_the_table_says(parts: Parts, name: str, guide: str, engine: str) -> None:
    row = measure(case(parts, name, guide), parts, STEPS, engine)
    assert tuple(row[column] for column in method_costs.MEASURED) == EXPECTED[name, guide]
    assert method_costs.differs(row) == []
    assert row["tokens"] == STEPS * len(method_costs.PROMPTS)


def test_a_wrong_table_is_found_out(parts: Parts) -> None:
    honest = case(parts, "farma", OWN)
    wrong = replace(honest, cost=replace(honest.cost, reward_rows=0, reward_candidates=1))
    assert method_costs.differs(measure(wrong, parts, STEPS)) == ["reward_tokens_per_token"]


def test_wrong_counters_are_found_out(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    from rgtg_fast.models.runner import ModelRunner

    step = ModelRunner.step

    def counting_twice(self: ModelRunner, *arguments: Any) -> torch.Tensor:
        self.counter.calls += 1
        return step(self, *arguments)

    monkeypatch.setattr(ModelRunner, "step", counting_twice)
    with pytest.raises(
        RGTGError, match=r"pargs \(a model of its own\): \(4, 12, 4, 60\) forwards and tokens were seen"
    ):
        measure(case(parts, "pargs", OWN), parts, STEPS)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens were sampled, one number a draw."""
    numbers: list[int] = []
    draw = Sampler.draw

    def noted(self: Sampler, logits: torch.Tensor, slots: list[int]) -> list[tuple[int, float]]:
        numbers.append(len(slots))
        return draw(self, logits, slots)

    monkeypatch.setattr(Sampler, "draw", noted)
    return numbers


def strategy_row(parts: Parts, name: str, new_tokens: int) -> dict[str, Any]:
    # No end-of-sequence token: every answer has all its tokens.
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    endless = Parts(parts.base, tokenizer, parts.folder)
    row = measure_strategy(name, method_costs.strategies(endless)[name], endless, new_tokens)
    assert row["tokens"] == new_tokens * len(method_costs.PROMPTS)
    return row


def test_best_of_n_costs_n_answers_and_reads_each_with_its_prompt(parts: Parts) -> None:
    row = strategy_row(parts, "best_of_n", 10)
    ids = [
        parts.tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        for text in method_costs.PROMPTS
    ]
    prompt = sum(len(each["input_ids"]) for each in ids) / len(ids)  # pyright: ignore
    assert row["lm_tokens_per_token"] == 4
    assert row["reward_tokens_per_token"] == pytest.approx(4 * (prompt + 10) / 10)
    assert row["reward_calls_per_step"] * 10 == 4 * len(ids)


def test_blocks_cost_k_blocks_and_at_most_the_best_once_more(parts: Parts, drawn: list[int]) -> None:
    row = strategy_row(parts, "blockwise", 12)
    assert row["lm_tokens_per_token"] == 4 == sum(drawn) / row["tokens"]
    judged = row["reward_tokens_per_token"]
    assert 4 < judged <= 5  # some best block was not its prompt's last
    # Blocks of four tokens, three prompts: forwards are tokens over four.
    assert row["reward_calls_per_step"] * 12 * 4 == pytest.approx(judged * row["tokens"])


def test_segments_cost_the_tokens_that_were_drawn(parts: Parts, drawn: list[int]) -> None:
    row = strategy_row(parts, "segment", 12)
    assert sum(drawn) > row["tokens"]  # something was rejected
    assert row["reward_tokens_per_token"] * row["tokens"] == pytest.approx(sum(drawn))
    # The last token of an answer, or of a segment rejected there, need not enter the base model.
    assert 0.8 * sum(drawn) < row["lm_tokens_per_token"] * row["tokens"] <= sum(drawn)


def test_a_gate_costs_the_guided_tokens_k_times_and_the_others_at_most_once(parts: Parts) -> None:
    row = method_costs.measure_gate(parts, K, 24)
    share = float(row["settings"].partition("guided=")[2].rstrip(")"))
    assert 0.1 < share < 0.9
    assert row["lm_tokens_per_token"] == 1
    assert K * share - 1e-2 < row["reward_tokens_per_token"] <= K * share + (1 - share) + 1e-2
    assert row["reward_tokens_per_token"] > K * share + 0.1  # something was skipped and caught up with


@pytest.mark.model
@pytest.mark.parametrize(("name", "guide"), daily(product(["pargs", "farma"], [OWN, SHARED]), each))
def test_the_real_model_costs_the_same(smollm2: Path, tmp_path: Path, name: str, guide: str) -> None:
    model, tokenizer = load_causal_lm(str(smollm2), "cpu", "bfloat16")
    assert tokenizer is not None
    real = Parts(model, tokenizer, tmp_path)
    assert method_costs.differs(measure(case(real, name, guide), real, 2)) == []


ROW = {
    "model": "tiny",
    "dtype": "float32",
    "rows": "3",
    "k": "5",
    "rgtg_fast": "0.1.0",
    "commit": "abc",
    "method": "farma",
    "guide": OWN,
    **dict.fromkeys(method_costs.MEASURED, "1"),
    **{f"table_{name}": "1" for name in method_costs.MEASURED},
}


def test_the_table_joins_what_is_equal_and_names_what_is_not() -> None:
    wrong = {**ROW, "method": "pargs", "table_reward_tokens_per_token": "5"}
    text = method_tables.costs_block([ROW, {**ROW, "method": "genarm"}, wrong])
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert lines[1:] == [
        f"| farma, genarm | {OWN} | 1 | 1 | 1 | 1 | yes |",
        f"| pargs | {OWN} | 1 | 1 | 1 | 1 | no: 5 reward tokens per token |",
    ]
    assert method_tables.cost_blocks([]) == method_tables.NO_COSTS


def test_strategies_stand_beside_their_formulas() -> None:
    row = {
        "method": "blockwise",
        "settings": "Blocks(k=4, length=4, temperature=0.123456, top_k=None)",
        "lm_tokens_per_token": "4",
        "reward_tokens_per_token": "4.5",
    }
    (blocks,) = (strategy for strategy in STRATEGIES if strategy.name == "blockwise")
    line = method_tables.strategies_block([row]).splitlines()[-1]
    assert (
        line == f"| blockwise | k=4, length=4, temperature=0.123 | 4 | {blocks.lm} | 4.5 | {blocks.reward} |"
    )


def test_what_was_measured_is_what_the_table_says() -> None:
    rows = read(RESULTS / "method_costs.csv")
    assert {row["method"] for row in rows} >= {strategy.name for strategy in STRATEGIES} | {method_costs.GATE}
    for row in rows:
        wrong = [name for name in method_costs.MEASURED if row[f"table_{name}"] not in ("", row[name])]
        assert not wrong, f"{row['method']}: {wrong}"
