"""A study over tiny models: what is decoded, what is resumed, what is said."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rgtg_fast import Guidance, RewardGuidedDecoder, RGTGError
from rgtg_fast.evaluation.study import answers as answering
from rgtg_fast.evaluation.study.prompts import prompt_seed
from rgtg_fast.evaluation.study.report import write_report
from rgtg_fast.evaluation.study.run import Results, run_study
from rgtg_fast.evaluation.study.settings import Study
from rgtg_fast.evaluation.study.summary import COLUMNS, summarize
from tests.conftest import make_rm, make_tokenizer
from tests.evaluation.studies import PROMPTS, models, saved, study
from tests.models.adapters import write_adapter

TIMES = ("seconds",)


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def done(named: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_study(study(tmp_path_factory.mktemp("study"), named))


def rows_of(folder: str | Path, name: str = "answers.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def untimed(rows: list[dict[str, Any]]) -> list[str]:
    """Rows without what two runs never share, in an order of their own."""
    return sorted(
        json.dumps({k: v for k, v in row.items() if k not in TIMES}, sort_keys=True) for row in rows
    )


def copied(done: Results, folder: Path) -> Study:
    """The same study with the same results in another folder."""
    shutil.copytree(done.study.output, folder / "out")
    values = {name: getattr(done.study, name) for name in done.study.__dataclass_fields__}
    return Study(**values | {"output": str(folder / "out")})


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The guides of the decoders that are made from now on."""
    made: list[Any] = []
    make: Callable[..., Any] = RewardGuidedDecoder.from_pretrained

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(args[1] if len(args) > 1 else None)
        return make(*args, **kwargs)

    monkeypatch.setattr(answering.RewardGuidedDecoder, "from_pretrained", counted)
    return made


def test_every_prompt_has_its_answers(done: Results) -> None:
    counts = {cell.label: len(found) for cell, found in done.answers.items()}
    assert counts == {
        "unguided (τ = 1)": 10,
        "greedy (k = 10, τ = 0)": 5,
        "pargs (β = 1, k = 5, τ = 1)": 10,
        "pargs (β = 4, k = 5, τ = 1)": 10,
        "best (k = 10, τ = 1)": 10,
    }
    assert len(rows_of(done.study.output)) == 45
    assert done.warnings == []
    assert {row["index"] for rows in done.answers.values() for row in rows} == set(range(5))


def test_answers_are_the_decoders_own(done: Results, named: dict[str, str]) -> None:
    cell = next(cell for cell in done.answers if cell.beta == 4)
    decoder = RewardGuidedDecoder.from_pretrained(named["lm"], named["guide"], max_batch=1)
    for row in done.answers[cell]:
        key = next(prompt.key for prompt in done.prompts if prompt.index == row["index"])
        chat = [{"role": "user", "content": PROMPTS[row["index"]]}]
        assert row["prompt"] == chat
        (own,) = decoder.generate([chat], 6, Guidance(5, 4.0, 1.0), prompt_seed(row["seed"], key))
        assert (row["response"], row["finish"], row["tokens"]) == (
            own.text,
            own.finish_reason,
            len(own.tokens),
        )
        assert row["guide_reward"] == pytest.approx(own.reward, abs=1e-5)
        assert row["guided_logprob"] == pytest.approx(own.guided_logprob, abs=1e-4)


def test_methods_share_their_noise_and_prompts_do_not() -> None:
    seeds = {prompt_seed(seed, key) for seed in range(3) for key in PROMPTS}
    assert len(seeds) == 15
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert prompt_seed(1, "w1") == prompt_seed(1, "w1")


def test_a_guide_without_weight_changes_no_answer(named: dict[str, str], tmp_path: Path) -> None:
    methods = [
        {"name": "unguided", "top_k": 5},
        {"name": "pargs", "reward": named["guide"], "top_k": 5, "beta": 0},
    ]
    unguided, guided = run_study(study(tmp_path, named, methods=methods)).answers.values()
    assert [row["response"] for row in unguided] == [row["response"] for row in guided]
    assert len({row["response"] for row in unguided}) > 5


@pytest.mark.model
def test_the_real_model_and_its_guides(smollm2: Path, tmp_path: Path) -> None:
    values = {
        "output": str(tmp_path / "out"),
        "prompts": ["How do I make tea?", "What is the capital of France?"],
        "max_new_tokens": 8,
        "judges": {"j": "bundled:args"},
        "methods": [
            {"name": "unguided"},
            {"name": "pargs", "reward": "bundled:pargs", "beta": 5},
            {"name": "best-of-2", "reward": "bundled:args", "best_of": 2},
            {"name": "cards", "reward": "bundled:args", "strategy": "segment:target=1"},
        ],
    }
    results = run_study(Study.of(values), str(smollm2), "SmolLM2")
    rows = {row["method"]: row for row in write_report(results)}
    assert rows["pargs"]["lm_tokens_per_token"] == pytest.approx(10)
    assert rows["pargs"]["lm_calls_per_token"] == pytest.approx(1)
    assert all(row["reward"] is not None for row in rows.values())
    assert any(line.startswith("the judge j is the reward model bundled:args") for line in results.warnings)
    assert "SmolLM2 answers 2 prompts" in (tmp_path / "out" / "report.md").read_text()


def test_costs_are_what_the_methods_promise(done: Results) -> None:
    rows = {(row["method"], row["beta"]): row for row in summarize(done)}
    plain, guided, best = rows["unguided", None], rows["pargs", 4.0], rows["best", None]
    names = ("lm_calls_per_token", "rm_calls_per_token", "lm_tokens_per_token", "rm_tokens_per_token")
    assert [plain[name] for name in names] == pytest.approx([1, 0, 1, 0])
    assert [guided[name] for name in names] == pytest.approx([1, 1, 1, 5])
    # Three samples for every answer that is kept, and one call of the guide for each.
    lengths = [
        row["decided"] for cell, found in done.answers.items() if cell.method == "best" for row in found
    ]
    assert best["rm_calls_per_token"] == pytest.approx(3 * len(lengths) / sum(lengths))
    assert best["lm_tokens_per_token"] >= 1.5
    assert best["lm_calls_per_token"] == best["lm_tokens_per_token"]


def test_sampling_the_base_model_diverges_from_it_by_nothing(done: Results) -> None:
    rows = {(row["method"], row["beta"]): row for row in summarize(done)}
    assert rows["unguided", None]["kl"] == pytest.approx(0, abs=1e-4)
    assert rows["pargs", 4.0]["kl"] > rows["pargs", 1.0]["kl"] > 0
    assert rows["greedy", None]["kl"] is None
    assert rows["best", None]["kl"] is None


def test_the_summary_is_what_a_plain_reading_gives(done: Results) -> None:
    found = {(row["method"], row["beta"]): row for row in summarize(done)}
    scores = rows_of(done.study.output, "scores.jsonl")
    assert len(scores) == 45

    def rewards(method: str, beta: float | None = None) -> dict[int, list[float]]:
        own: dict[int, list[float]] = {}
        for row in scores:
            if row["method"] == method and row["setting"].get("beta") == beta:
                own.setdefault(row["index"], []).append(row["reward"])
        return own

    base, guided = rewards("unguided"), rewards("pargs", 4.0)
    means = [sum(guided[i]) / 2 for i in range(5)]
    gaps = [mean - sum(base[i]) / 2 for i, mean in enumerate(means)]
    row = found["pargs", 4.0]
    mean = sum(means) / 5
    assert row["reward"] == pytest.approx(mean)
    assert row["reward_se"] == pytest.approx((sum((m - mean) ** 2 for m in means) / 4 / 5) ** 0.5)
    assert row["reward_diff"] == pytest.approx(sum(gaps) / 5)
    assert min(gaps) <= row["diff_lo"] <= row["reward_diff"] <= row["diff_hi"] <= max(gaps)
    wins = [
        sum((a > b) + (a == b) / 2 for a, b in itertools.product(guided[i], base[i])) / 4 for i in range(5)
    ]
    assert row["win_rate"] == pytest.approx(sum(wins) / 5)
    lengths = [a["tokens"] for cell, rows in done.answers.items() if cell.beta == 4 for a in rows]
    assert row["length"] == pytest.approx(sum(lengths) / len(lengths))
    assert found["unguided", None]["reward_diff"] is None


def test_nothing_is_done_twice(done: Results, tmp_path: Path, loads: list[Any]) -> None:
    again = copied(done, tmp_path)
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.jsonl")}
    assert len(first) == 3
    results = run_study(again)
    assert loads == []
    assert {name: (tmp_path / "out" / name).read_bytes() for name in first} == first
    assert summarize(results) == summarize(done)


@pytest.mark.parametrize("cut", [1, 700, 6000])
def test_a_killed_run_goes_on_where_it_stopped(done: Results, tmp_path: Path, cut: int) -> None:
    again = copied(done, tmp_path)
    answers = tmp_path / "out" / "answers.jsonl"
    whole = rows_of(tmp_path / "out")
    left = answers.read_bytes()[:-cut]
    # Rows are as long as the models' paths make them: a cut between two of them is moved into one.
    answers.write_bytes(left[:-1] if left.endswith(b"\n") else left)
    (tmp_path / "out" / "scores.jsonl").write_bytes(b"")
    kept = answers.read_bytes().rpartition(b"\n")[0] + b"\n"
    results = run_study(again)
    assert answers.read_bytes().startswith(kept)
    assert untimed(rows_of(tmp_path / "out")) == untimed(whole)
    assert any("the last line of answers.jsonl had been cut off" in line for line in results.warnings)
    # What is measured is the same, but for the seconds.
    own, before = summarize(results), summarize(done)
    assert [{**row, "tokens_per_second": 0} for row in own] == [
        {**row, "tokens_per_second": 0} for row in before
    ]


def test_one_missing_answer_is_the_only_one_decoded(done: Results, tmp_path: Path, loads: list[Any]) -> None:
    again = copied(done, tmp_path)
    answers = tmp_path / "out" / "answers.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    gone = next(n for n, line in enumerate(lines) if json.loads(line)["method"] == "pargs")
    answers.write_text("".join(lines[:gone] + lines[gone + 1 :]))
    run_study(again)
    assert len(loads) == 1
    now = answers.read_text().splitlines()
    assert len(now) == len(lines)
    new, old = json.loads(now[-1]), json.loads(lines[gone])
    assert {**new, "seconds": 0} == {**old, "seconds": 0}


def test_a_resumed_study_has_the_numbers_of_a_whole_one(named: dict[str, str], tmp_path: Path) -> None:
    """To the last digit: rewards by judges, and what answers cost where a portion's cost is shared."""
    methods = [
        {"name": "unguided"},
        {"name": "best", "reward": named["guide"], "best_of": 3},
        {"name": "cards", "reward": named["guide"], "strategy": "segment:target=1,entropy=0,min_tokens=1"},
        {"name": "gated", "reward": named["guide"], "gate_entropy": 2.0, "top_k": 5},
    ]
    config = study(tmp_path, named, methods=methods, batch_size=2)
    run_study(config)
    names = ("answers.jsonl", "scores.jsonl")

    def numbers(name: str) -> list[dict[str, Any]]:
        found = [{**row, "seconds": 0} for row in rows_of(tmp_path / "out", name)]
        return sorted(found, key=lambda row: (row["method"], row["index"], row["seed"]))

    whole = {name: numbers(name) for name in names}
    for name in names:
        path = tmp_path / "out" / name
        lines = path.read_text().splitlines(keepends=True)
        # One answer of every method is gone, and the last line is torn.
        kept = [line for n, line in enumerate(lines) if n % 10 != 3]
        path.write_text("".join(kept)[:-40])
    run_study(config)
    for name in names:
        assert numbers(name) == whole[name]


def test_seeds_that_are_new_have_portions_of_their_own(
    named: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = [{"name": "unguided"}]
    run_study(study(tmp_path, named, methods=methods, seeds=[0]))
    asked: list[int] = []
    generate = RewardGuidedDecoder.generate

    def counted(self: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(len(prompts))
        return generate(self, prompts, *args, **kwargs)

    monkeypatch.setattr(RewardGuidedDecoder, "generate", counted)
    run_study(study(tmp_path, named, methods=methods, seeds=[0, 5]))
    assert sum(asked) == len(PROMPTS)


def test_the_cost_of_best_of_n_is_that_of_its_samples(named: dict[str, str]) -> None:
    decoder = RewardGuidedDecoder.from_pretrained(named["lm"], reward=named["guide"], dtype="float32")
    result = decoder.generate(list(PROMPTS), 6, seed=list(range(5)), strategy="best_of_n:n=3")
    costs = answering.answer_costs(result.rows, result.stats, strategy=True)
    for row, cost in zip(result.rows, costs, strict=True):
        samples = [row, *(row.alternatives or [])]
        tokens = sum(len(sample.tokens) + (sample.end_token is not None) for sample in samples)
        assert (cost["lm_calls"], cost["lm_tokens"], cost["rm_tokens"]) == (tokens, tokens, tokens)
        assert cost["rm_calls"] == 3
    assert sum(cost["lm_tokens"] for cost in costs) == result.stats.lm_tokens
    assert sum(cost["rm_tokens"] for cost in costs) == result.stats.reward_tokens
    assert sum(cost["seconds"] for cost in costs) == pytest.approx(result.stats.seconds)


def test_answers_of_other_settings_are_left_out_and_kept(
    done: Results, tmp_path: Path, loads: list[Any]
) -> None:
    again = copied(done, tmp_path)
    changed = Study(**{**vars(again), "methods": again.methods[:2], "limit": 3, "seeds": (1,)})
    results = run_study(changed)
    assert [len(rows) for rows in results.answers.values()] == [3, 3]
    # Greedy answers belong to the first seed, which is another one now.
    assert len(loads) == 1
    assert any(line.startswith("42 answers in answers.jsonl belong to other") for line in results.warnings)
    longer = Study(**{**vars(again), "methods": again.methods[:1], "max_new_tokens": 4})
    assert all(row["tokens"] <= 4 for row in next(iter(run_study(longer).answers.values())))


def test_a_guide_that_was_trained_anew_decodes_anew(named: dict[str, str], tmp_path: Path) -> None:
    guide = tmp_path / "guide"
    shutil.copytree(named["guide"], guide)
    methods = [{"name": "unguided"}, {"name": "pargs", "reward": str(guide)}]
    run_study(study(tmp_path, named, methods=methods))
    assert len(rows_of(tmp_path / "out")) == 20
    saved(make_rm(seed=9), guide)
    results = run_study(study(tmp_path, named, methods=methods))
    assert len(rows_of(tmp_path / "out")) == 30
    assert any("10 answers in answers.jsonl belong to other" in line for line in results.warnings)


def test_prompts_that_are_twice_or_empty(named: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = ["w1 w2", "w3", "w1 w2", " ", "\n\nHuman: w3\n\nAssistant:"]
    path.write_text("".join(json.dumps({"prompt": text, "text": "-"}) + "\n" for text in rows))
    methods = [{"name": "unguided", "top_k": 5}]
    results = run_study(study(tmp_path, named, prompts=str(path), methods=methods))
    assert [prompt.index for prompt in results.prompts] == [0, 1]
    assert "2 duplicate prompts were left out" in results.warnings
    assert "1 empty prompts were left out" in results.warnings
    path.write_text('{"question": "x"}\n')
    with pytest.raises(RGTGError, match=r"row 0 of .* is not a prompt: it has no field 'prompt'"):
        run_study(study(tmp_path, named, prompts=str(path), methods=methods))
    path.write_text('{"prompt": ""}\n')
    with pytest.raises(RGTGError, match="has no prompts"):
        run_study(study(tmp_path, named, prompts=str(path), methods=methods))


def test_answers_of_another_program_are_judged(named: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    rows = [
        {"prompt": PROMPTS[0], "response": "w5 w6 w7"},
        {"prompt": f"\n\nHuman: {PROMPTS[1]}\n\nAssistant:", "response": "w8"},
        {"prompt": PROMPTS[0], "response": "w9 w9"},
        {"prompt": "w40 never asked", "response": "w1"},
        {"prompt": PROMPTS[2], "response": ""},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    methods = [{"name": "unguided"}, {"name": "other", "outputs": str(path)}]
    results = run_study(study(tmp_path, named, methods=methods))
    cell = next(cell for cell in results.answers if cell.method == "other")
    found = [(row["index"], row["seed"], row["response"], row["tokens"]) for row in results.answers[cell]]
    assert found == [(0, 0, "w5 w6 w7", 3), (0, 1, "w9 w9", 2), (1, 0, "w8", 1), (2, 0, "", 0)]
    assert results.warnings == [
        "other: 1 answers belong to no prompt of the study",
        "1 of the 4 answers of other are empty",
        "other has no answer to 2 prompts: compared on the others",
    ]
    row = next(row for row in summarize(results) if row["method"] == "other")
    assert row["tokens_per_second"] is None
    assert row["kl"] is None
    assert row["reward_diff"] is not None
    assert untimed(rows_of(tmp_path / "out")) == untimed(rows_of(run_study(results.study).study.output))
    path.write_text('{"prompt": "w1"}\n')
    with pytest.raises(RGTGError, match=r"row 0 of .* is not an answer"):
        run_study(study(tmp_path, named, methods=methods))


@torch.inference_mode()
def logprob(folder: str, chat: list[dict[str, str]], answer: list[int]) -> float:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), make_tokenizer()
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text)["input_ids"]
    logprobs = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(logprobs.gather(-1, torch.tensor(answer).unsqueeze(-1)).sum())


def test_another_policy_diverges_from_the_studys_model(named: dict[str, str], tmp_path: Path) -> None:
    methods = [{"name": "unguided"}, {"name": "dpo", "model": named["policy"], "support": "all"}]
    results = run_study(study(tmp_path, named, methods=methods, limit=3))
    cell = next(cell for cell in results.answers if cell.method == "dpo")
    decoder = RewardGuidedDecoder.from_pretrained(named["policy"])
    keys = {prompt.index: prompt.key for prompt in results.prompts}
    for row in results.answers[cell]:
        seed = prompt_seed(row["seed"], keys[row["index"]])
        (own,) = decoder.generate([row["prompt"]], 6, cell.guidance, seed)
        assert row["response"] == own.text
        answer = own.tokens + ([] if own.end_token is None else [own.end_token])
        expected = [logprob(named[name], row["prompt"], answer) for name in ("policy", "lm")]
        assert [row["guided_logprob"], row["base_logprob"]] == pytest.approx(expected, abs=1e-3)
    assert summarize(results)[1]["kl"] > 1


def test_strategies_and_gates_get_a_guide_with_a_cache_of_its_own(
    named: dict[str, str], tmp_path: Path
) -> None:
    methods = [
        {"name": "unguided"},
        {"name": "cards", "reward": named["guide"], "strategy": "segment:target=1,min_tokens=1,max_tokens=3"},
        {"name": "gate", "reward": named["guide"], "gate_entropy": 1.0},
        {"name": "blocks", "reward": named["guide"], "strategy": "blockwise:k=2,length=3"},
    ]
    results = run_study(study(tmp_path, named, methods=methods))
    assert {len(rows) for rows in results.answers.values()} == {10}
    assert all(answering.needs_own_cache(cell) for cell in results.answers if cell.method != "unguided")


def test_a_policys_adapter_is_merged_in_the_dtype_of_its_method(
    named: dict[str, str], tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(named["lm"])
    folder = write_adapter(tmp_path / "adapter", base, head=None, size=0.01)
    methods = [
        {"name": "unguided", "top_k": 5},
        {"name": "dpo", "model": str(folder), "support": "all", "dtype": "float64"},
    ]
    results = run_study(study(tmp_path, named, methods=methods, limit=3))
    cell = next(cell for cell in results.answers if cell.method == "dpo")
    decoder = RewardGuidedDecoder.from_pretrained(str(folder), dtype="float64")
    for row in results.answers[cell]:
        key = next(prompt.key for prompt in results.prompts if prompt.index == row["index"])
        (own,) = decoder.generate([row["prompt"]], 6, cell.guidance, prompt_seed(row["seed"], key))
        assert row["response"] == own.text
        # Not to the rounding of float32, which such a small change of the weights would not survive.
        assert row["guided_logprob"] == pytest.approx(own.guided_logprob, abs=1e-7)
    assert summarize(results)[1]["kl"] != 0


@pytest.mark.parametrize("key", ["reward", "model", "outputs"])
def test_a_model_that_is_missing_is_missed_at_once(named: dict[str, str], tmp_path: Path, key: str) -> None:
    methods = [{"name": "unguided"}, {"name": "late", key: str(tmp_path / "none")}]
    with pytest.raises(RGTGError, match=r"method late: .*none (contains no model|does not exist)"):
        run_study(study(tmp_path, named, methods=methods))
    assert not (tmp_path / "out" / "answers.jsonl").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RGTGError, match=r"judge x: .*empty contains no model"):
        run_study(study(tmp_path, named, judges={"x": str(empty)}))


def test_guides_over_the_whole_vocabulary(named: dict[str, str], tmp_path: Path) -> None:
    both = f"mixture:0.5*genarm:{named['policy']}+0.5*contrastive"
    methods = [
        {"name": "unguided"},
        {"name": "farma", "reward": f"farma:{named['policy']}", "support": "combined", "top_k": 5},
        {"name": "genarm", "reward": f"genarm:{named['policy']}", "support": "all", "beta": [0.5, 1]},
        {"name": "mixture", "reward": both, "support": "all"},
    ]
    results = run_study(study(tmp_path, named, methods=methods, limit=2))
    rows = {row["method"]: row for row in summarize(results)}
    assert rows["farma"]["rm_tokens_per_token"] == pytest.approx(1)
    assert rows["genarm"]["top_k"] is None
    assert rows["mixture"]["lm_tokens_per_token"] == pytest.approx(3)
    assert all(row["kl"] > 0 for name, row in rows.items() if name != "unguided")


def test_a_judge_that_is_the_guide_is_said_first(named: dict[str, str], tmp_path: Path) -> None:
    judges = {"fair": named["judge"], "unfair": named["guide"]}
    results = run_study(
        study(
            tmp_path,
            named,
            judges=judges,
            limit=2,
            methods=[{"name": "unguided"}, {"name": "pargs", "reward": named["guide"]}],
        )
    )
    assert results.warnings[0].startswith("the judge unfair is the reward model ")
    write_report(results)
    lines = (tmp_path / "out" / "report.md").read_text().splitlines()
    assert lines[2].startswith("- **Note:** the judge unfair is the reward model")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.index("the judge unfair is the reward model") < page.index("<table")


def test_a_cut_answer_is_rated_with_or_without_an_end(named: dict[str, str], tmp_path: Path) -> None:
    judges = {"always": named["judge"], "finished": {"model": named["judge"], "ends": "finished"}}
    results = run_study(
        study(tmp_path, named, judges=judges, methods=[{"name": "unguided"}], seeds=list(range(8)))
    )
    (cell,) = results.answers
    always, finished = results.scores["always"][cell], results.scores["finished"][cell]
    cut = {(row["index"], row["seed"]): row["finish"] == "length" for row in results.answers[cell]}
    assert set(cut.values()) == {True, False}
    assert all((always[key] != finished[key]) == was_cut for key, was_cut in cut.items())
    rows = rows_of(tmp_path / "out", "scores.jsonl")
    assert len(rows) == 2 * len(cut)
    assert all(row["reward"] == results.scores[row["judge"]][cell][row["index"], row["seed"]] for row in rows)


def test_tables_say_at_which_token_a_judge_read(named: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    reasons = ["length", "stop", "max_tokens", "eos", None]
    rows = [
        {"prompt": p, "response": "w5 w6", "finish_reason": r} for p, r in zip(PROMPTS, reasons, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = tmp_path / "pairs.jsonl"
    told = {"prompt": "w1", "chosen": "w2 w3", "rejected": "w4", "chosen_finish_reason": "length"}
    pairs.write_text(json.dumps(told) + "\n")
    judges = {"always": named["judge"], "finished": {"model": named["judge"], "ends": "finished"}}
    methods = [{"name": "unguided", "outputs": str(path)}]
    results = run_study(study(tmp_path, named, judges=judges, methods=methods, pairs=str(pairs)))
    (cell,) = results.answers
    assert [row.get("finish") for row in results.answers[cell]] == ["length", "eos", "length", "eos", None]
    always, finished = results.scores["always"][cell], results.scores["finished"][cell]
    assert [always[i, 0] != finished[i, 0] for i in range(5)] == [True, False, True, False, False]
    table = write_report(results)
    assert [(row["judge"], row["cut"], row["read_at"]) for row in table] == [
        ("always", 2, "end token"),
        ("finished", 2, "end token, or last token where cut"),
    ]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "an end token, which is put behind all 5, the 2 that were cut included. Rewards" in text
    assert (
        "at the end token of 3 that ended (1 of them without a finish\\_reason, taken to have ended) and"
        in text
    )
    assert "At 100 %, whole answers are read at the end token of 1 that ended" in text
    for word, expected in (("no", ["length"] * 5), ("yes", ["eos"] * 5)):
        again = run_study(study(tmp_path, named, judges=judges, methods=methods, answers_ended=word))
        assert [row["finish"] for row in next(iter(again.answers.values()))] == expected
    rows[0]["finish_reason"] = "crashed"
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(RGTGError, match=r"row 0 of .* finish_reason='crashed' is not one of"):
        run_study(study(tmp_path, named, judges=judges, methods=methods))


def test_a_system_column_reaches_the_prompt(named: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "w1", "system": "w2"}) + "\n")
    results = run_study(study(tmp_path, named, prompts=str(path), methods=[{"name": "unguided"}]))
    assert results.prompts[0].given == [
        {"role": "system", "content": "w2"},
        {"role": "user", "content": "w1"},
    ]


def test_the_report(done: Results, tmp_path: Path) -> None:
    results = run_study(copied(done, tmp_path))
    rows = write_report(results, {"on": "a <machine>"})
    out = tmp_path / "out"
    with (out / "summary.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == list(COLUMNS)
    assert [row["method"] for row in table] == ["unguided", "greedy", "pargs", "pargs", "best"]
    assert [float(row["reward"]) for row in table] == pytest.approx([row["reward"] for row in rows], rel=1e-5)
    assert table[0]["reward_diff"] == ""
    text = (out / "report.md").read_text()
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert pictures == [f"figures/reward_over_{name}.svg" for name in ("beta", "kl", "speed")]
    assert all((out / picture).is_file() for picture in pictures)
    for line in text.splitlines():
        assert not line.startswith("|") or len(re.findall(r"(?<!\\)\|", line)) in (4, 5, 10, 12), line
    with (out / "pairwise.csv").open(newline="") as file:
        pairs = {(row["method"], row["other"]): row for row in csv.DictReader(file)}
    assert len(pairs) == 6
    # One setting each: the difference is the table's.
    assert float(pairs["greedy", "unguided"]["difference"]) == pytest.approx(rows[1]["reward_diff"], rel=1e-4)
    assert f"{float(pairs['best', 'greedy']['difference']):+.3f}" in text
    page = (out / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "<script" not in page
    assert "a &lt;machine&gt;" in page
    assert page.count("data:image/svg+xml;base64,") == 3
    assert page.count("<section>") == 5
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    write_report(run_study(results.study), {"on": "a <machine>"})
    assert {path: path.read_bytes() for path in before} == before


def test_agreement_with_people_is_measured_once(named: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"w{n}", "chosen": f"w{n + 1} w2 w3", "rejected": f"w{n + 2} w5"} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    methods = [
        {"name": "unguided"},
        {"name": "pargs", "reward": named["guide"], "beta": [1, 2]},
        {"name": "self", "reward": "contrastive"},
    ]
    judges = {"judge": named["judge"], "again": {"model": named["judge"], "ends": "finished"}}
    settings = study(tmp_path, named, pairs=str(path), methods=methods, judges=judges, limit=2)
    results = run_study(settings)
    assert [(one.name, one.judge) for one in results.agreements] == [("judge", True), (named["guide"], False)]
    assert results.agreements[0].longer_wins["accuracy"] == 1
    assert [point["n"] for point in results.agreements[0].accuracy] == [8] * 5
    assert len(rows_of(tmp_path / "out", "accuracy.jsonl")) == 2
    again = run_study(settings)
    assert again.agreements == results.agreements
    assert len(rows_of(tmp_path / "out", "accuracy.jsonl")) == 2
    write_report(again)
    assert (tmp_path / "out" / "figures" / "accuracy.svg").is_file()


def test_a_study_without_judges_still_measures_the_rest(named: dict[str, str], tmp_path: Path) -> None:
    results = run_study(study(tmp_path, named, judges={}, limit=2))
    rows = write_report(results)
    assert [row["judge"] for row in rows] == [None] * 5
    assert all(row["reward"] is None and row["length"] for row in rows)


def test_a_model_without_a_name(named: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(RGTGError, match="the study names no model"):
        run_study(study(tmp_path, named, model=None))


def test_a_setting_that_cannot_work_names_the_method(named: dict[str, str], tmp_path: Path) -> None:
    methods = [{"name": "unguided"}, {"name": "wide", "reward": named["guide"], "support": "all"}]
    with pytest.raises(RGTGError, match=r"wide \(β = 1, τ = 1\): support='all' needs a reward over"):
        run_study(study(tmp_path, named, methods=methods))
    assert len(rows_of(tmp_path / "out")) == 10
