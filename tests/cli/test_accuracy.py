"""`rgtg-fast accuracy`: its JSON, several guides, adapters, the figure, and every mistake in one line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from rgtg_fast.evaluation.accuracy import prefix_accuracy, score_pairs
from rgtg_fast.training.data import load_pairs, tokenize_pairs
from rgtg_fast.training.packing import use_packed_attention
from tests.cli.conftest import Run, byte_tokenizer, save

ANSWERS = ["Yes.", "No, never.", "Perhaps: ask again later", "I do not know!", "Of course", "42"]
DIALOGUES = [
    {
        "prompt": f"\n\nHuman: Question {n}?\n\nAssistant:",
        "chosen": ANSWERS[n % 6],
        "rejected": ANSWERS[(n * n + 1) % 6] + "..." * (n % 3 + 1),
    }
    for n in range(12)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl.gz"
    rows = [*DIALOGUES, DIALOGUES[0]]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def expected(folder: str, data: Path, model: Any = None) -> list[dict[str, Any]]:
    """The accuracies through the library, from a plain transformers model."""
    model = model if model is not None else AutoModelForSequenceClassification.from_pretrained(folder)
    use_packed_attention(model)
    pairs, _ = tokenize_pairs(load_pairs(data)[0], AutoTokenizer.from_pretrained(folder))
    return json.loads(json.dumps([point.as_dict() for point in prefix_accuracy(score_pairs(model, pairs))]))


def test_json(run: Run, lm: str, rm: str, data: Path) -> None:
    (report,) = run("accuracy", "--reward", rm, "--lm", lm, "--data", data, "--json").rows
    assert [point["fraction"] for point in report["accuracy"]] == [0.1, 0.25, 0.5, 0.75, 1]
    assert report["accuracy"] == expected(rm, data)
    assert all(set(point) == {"fraction", "accuracy", "ci95", "n"} for point in report["accuracy"])
    assert set(report["longer_wins"]) == {"accuracy", "ci95", "n"}
    assert (report["data"]["read"], report["data"]["kept"], report["data"]["duplicates"]) == (13, 12, 1)
    (guide,) = report["guides"]
    assert guide["accuracy"] == report["accuracy"]
    for point, gap in zip(guide["accuracy"], guide["above_longer_wins"], strict=True):
        assert gap["difference"] == pytest.approx(point["accuracy"] - report["longer_wins"]["accuracy"])
    assert report["differences"] == []


def test_several_guides_and_a_figure(run: Run, lm: str, rm: str, data: Path, tmp_path: Path) -> None:
    figure = tmp_path / "curves.png"
    arguments = ("accuracy", "--reward", rm, "--reward", "contrastive", "--lm", lm, "--data", data)
    limits = ("--fractions", "1,0.5", "--limit", 5)
    (report,) = run(*arguments, *limits, "--figure", figure, "--json").rows
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert [guide["reward"] for guide in report["guides"]] == [rm, "contrastive"]
    assert (report["data"]["limit"], report["data"]["kept"], report["longer_wins"]["n"]) == (5, 5, 5)
    for gap, one, other in zip(
        report["differences"], *(guide["accuracy"] for guide in report["guides"]), strict=True
    ):
        assert gap["rewards"] == [rm, "contrastive"]
        assert gap["difference"] == pytest.approx(one["accuracy"] - other["accuracy"])
        assert gap["ci95"][0] <= gap["difference"] <= gap["ci95"][1]
    table = run(*arguments, *limits)
    assert table.code == 0
    for text in ("50 %", "100 %", "longer wins", "contrastive", "−"):
        assert text in table.out
    assert "5 of 13 pairs kept" in table.err
    assert "1 dropped: seen before" in table.err


def test_the_table_says_which_token_was_read(run: Run, lm: str, rm: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    reasons = ("length", "eos", None)
    rows = [{**row, "chosen_finish_reason": reasons[n % 3]} for n, row in enumerate(DIALOGUES)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("accuracy", "--reward", rm, "--lm", lm, "--data", path)
    table = run(*arguments)
    ended = "whole answers are read at the end token of 20 that ended (16 of them without a finish_reason"
    assert ended in " ".join(table.out.split())
    (report,) = run(*arguments, "--json").rows
    assert report["read_at"].startswith(ended)
    assert (report["data"]["cut"], report["data"]["unstated"]) == (4, 16)
    (every,) = run(*arguments, "--answers-ended", "no", "--json").rows
    assert every["read_at"] == "whole answers are read at their last text token: all 24 were cut"
    # Prefixes of the text are what they were; whole answers are read elsewhere.
    assert every["accuracy"][:-1] == report["accuracy"][:-1]
    bad = run(*arguments, "--answers-ended", "perhaps")
    assert bad.code == 2
    assert "answers_ended='perhaps' is unknown: use one of auto, yes, no" in bad.err


def test_an_interrupted_run_goes_on(run: Run, lm: str, rm: str, data: Path, tmp_path: Path) -> None:
    kept = tmp_path / "rewards.jsonl"
    arguments = ("accuracy", "--reward", rm, "--reward", "contrastive", "--lm", lm, "--data", data, "--json")
    whole = run(*arguments, "--keep", kept)
    lines = kept.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2 * 12
    assert whole.rows == run(*arguments).rows
    # Killed in the middle of a line of the second guide.
    kept.write_bytes(b"".join(lines[:17]) + lines[17][:20])
    again = run(*arguments, "--keep", kept)
    assert again.rows == whole.rows
    assert sorted(kept.read_bytes().splitlines(keepends=True)) == sorted(lines)
    assert "12 of 12 pairs scored before" in again.err
    assert "contrastive: 5 of 12 pairs scored before" in again.err
    # In another precision the rewards are others.
    run(*arguments, "--keep", kept, "--dtype", "float64")
    assert len(kept.read_bytes().splitlines()) == 4 * 12


def test_a_file_that_holds_something_else_is_kept(
    run: Run, lm: str, rm: str, data: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "notes.txt"
    kept.write_text("no end of the line")
    answer = run("accuracy", "--reward", rm, "--lm", lm, "--data", data, "--keep", kept)
    assert f"{kept}:1 is not a row of such a file" in answer.error
    assert kept.read_text() == "no end of the line"


def test_an_adapter_is_judged_as_peft_applies_it(run: Run, lm: str, data: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    base = AutoModelForSequenceClassification.from_pretrained(lm, num_labels=1)
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        target_modules=["q_proj", "down_proj"],
        layers_to_transform=[1],
        modules_to_save=["score"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(base, config)
    folder = save(model, tmp_path / "adapter")
    expected_curve = expected(folder, data, model)
    for named in (("--lm", lm), ()):
        # Without --lm the adapter's own base is loaded, by the name that it keeps.
        (report,) = run("accuracy", "--reward", folder, *named, "--data", data, "--json").rows
        assert report["accuracy"] == expected_curve


def test_a_model_without_chat_template_reads_the_turns_as_text(
    run: Run, plain_lm: str, data: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(plain_lm, num_labels=1)
    folder = save(model, tmp_path / "rm", byte_tokenizer(chat=False))
    (report,) = run("accuracy", "--reward", folder, "--lm", plain_lm, "--data", data, "--json").rows
    use_packed_attention(model)
    pairs, _ = tokenize_pairs(load_pairs(data, chat=False)[0], byte_tokenizer(chat=False))
    assert report["accuracy"][-1]["accuracy"] == prefix_accuracy(score_pairs(model, pairs), [1])[0].accuracy
    assert report["data"]["kept"] == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--fractions", "0.5,2"), "fraction 2 of an answer is not in (0, 1]"),
        (("--fractions", "half"), "--fractions 'half' are not numbers"),
        (("--fractions", ","), "there is no fraction"),
        (("--data", "none.jsonl"), "cannot read none.jsonl: No such file or directory"),
        (("--layout", "x"), "layout='x' is unknown: use one of auto, plain, dialogue, tldr"),
        (("--layout", "tldr"), "no pairs are left of the 13"),
        (("--max-length", "4"), "no pairs are left of the 12"),
        (("--reward", "none"), "--reward none is not a reward model"),
        (("--reward", "a", "--reward", "a"), "a reward model is given twice"),
        (("--reward", "bundled:nothing"), "'bundled:nothing' is not a bundled reward model"),
        (("--reward", "/does/not/exist"), "reward model '/does/not/exist' does not exist"),
        (("--figure", "/does/not/exist/a.png"), "cannot write /does/not/exist/a.png: the folder"),
    ],
)
def test_mistakes_are_one_line(
    run: Run, lm: str, rm: str, data: Path, arguments: tuple[str, ...], message: str
) -> None:
    given = [] if "--reward" in arguments else ["--reward", rm]
    given += [] if "--data" in arguments else ["--data", str(data)]
    assert message in run("accuracy", *given, *arguments, "--lm", lm).error


def test_an_encoder_is_told_how_to_be_named(run: Run, lm: str, data: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = BertForSequenceClassification(
        BertConfig(vocab_size=len(byte_tokenizer()), num_labels=1, **sizes)
    )
    folder = save(encoder, tmp_path / "encoder")
    line = run("accuracy", "--reward", folder, "--lm", lm, "--data", data).error
    assert f"no `score` head over a causal trunk: use --reward text:{folder}" in line
    assert run("accuracy", "--reward", f"text:{folder}", "--lm", lm, "--data", data, "--limit", 3).code == 0


def test_one_label_of_several(run: Run, lm: str, data: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        lm, num_labels=2, id2label={0: "worse", 1: "better"}, label2id={"worse": 0, "better": 1}
    )
    folder = save(model, tmp_path / "two")
    arguments = ("accuracy", "--reward", folder, "--lm", lm, "--data", data, "--json")
    assert "2 labels ('worse', 'better')" in run(*arguments).error
    keep = ("--keep", tmp_path / "kept.jsonl")
    (better,) = run(*arguments, "--reward-label", "better", *keep).rows
    (worse,) = run(*arguments, "--reward-label", "worse", *keep).rows
    one = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    for label, report in ((1, better), (0, worse)):
        model = AutoModelForSequenceClassification.from_pretrained(lm, num_labels=1)
        model.load_state_dict(
            {**one.state_dict(), "score.weight": one.get_submodule("score").weight[label : label + 1]}
        )
        assert report["accuracy"] == expected(folder, data, model)
    assert better["accuracy"] != worse["accuracy"]
    several = run(*arguments, "--reward", "contrastive", "--reward-label", "better")
    assert "score one" in several.error
