"""Every user error is one line on stderr and exit code 2."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.support import CONTEXT, read_rows

SHORT = ("--max-new-tokens", 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--k", 0), ["k=0"]),
        (("--k", -3), ["k=-3"]),
        (("--k", 100000), ["k=100000", "vocabulary"]),
        (("--k", "many"), ["--k", "integer"]),
        (("--temperature", -1), ["temperature=-1"]),
        (("--temperature", "nan"), ["temperature=nan"]),
        (("--beta", "nan"), ["beta=nan"]),
        (("--beta", "inf"), ["beta=inf"]),
        (("--support", "everything"), ["support='everything'", "combined"]),
        (("--support", "combined"), ["support='combined'", "lm"]),
        (("--dtype", "int7"), ["int7", "float32"]),
        (("--device", "toaster"), ["toaster"]),
        (("--engine", "steam"), ["steam"]),
        (("--graphs", "--device", "cpu"), ["graphs=True", "cpu"]),
        (("--compile", "--engine", "native"), ["compile", "engine='transformers'"]),
        (("--max-new-tokens", 0), ["max_new_tokens=0"]),
        (("--max-new-tokens", CONTEXT), ["prompt", str(CONTEXT)]),
        (("--max-batch", 0, "--input", "PROMPTS"), ["max_batch=0"]),
        (("--max-length", 1), ["max_length=1"]),
        (("--seed", 2**64), ["seed"]),
        (("--stop", ""), ["stop"]),
        (("--lm", "/no/such/model"), ["/no/such/model"]),
        (("--reward", "/no/such/model"), ["/no/such/model"]),
        (("--no-such-option",), ["--no-such-option"]),
        (("--resume",), ["--output"]),
        (("--better", "You are kind."), ["--better", "contrastive"]),
    ],
)
def test_bad_option(
    run: Callable, prompts_file: Callable, lm: str, rm: str, options: tuple, words: list[str]
) -> None:
    source = prompts_file({"prompt": "one"})
    options = tuple(source if option == "PROMPTS" else option for option in options)
    prompt = () if "--input" in options else ("hello",)
    outcome = run("generate", *prompt, "--lm", lm, "--reward", rm, *SHORT, *options)
    assert outcome.out == ""
    for word in words:
        assert word in outcome.error


def test_empty_prompt(run: Callable, lm: str) -> None:
    assert "empty" in run("generate", "", "--lm", lm, *SHORT).error


def test_prompt_or_input(run: Callable, prompts_file: Callable, lm: str) -> None:
    assert "--input" in run("generate", "--lm", lm).error
    assert "not both" in run("generate", "hello", "--input", prompts_file({"prompt": "x"}), "--lm", lm).error


def test_reward_model_with_two_labels(run: Callable, lm: str, two_labels_rm: str) -> None:
    arguments = ("generate", "hello", "--lm", lm, "--reward", two_labels_rm, *SHORT, "--json")
    assert "2 labels ('LABEL_0', 'LABEL_1')" in run(*arguments).error
    assert "no label 'good'" in run(*arguments, "--reward-label", "good").error
    (row,) = run(*arguments, "--reward-label", "LABEL_1").rows
    assert row["reward_label"] == "LABEL_1"
    # The message offers the option, so that every command which decodes has it.
    for command in (("explain", "hello"), ("demo", "--prompt", "hello")):
        arguments = (*command, "--lm", lm, "--reward", two_labels_rm, "--max-new-tokens", 2, "--json")
        assert "--reward-label NAME" in run(*arguments).error
        assert run(*arguments, "--reward-label", "LABEL_1").code == 0
    for reward in ("contrastive", "none"):
        refused = run("generate", "hello", "--lm", lm, "--reward", reward, "--reward-label", "good", *SHORT)
        assert "--reward-label belongs to" in refused.error


def test_rounded_reward_model(run: Callable, lm: str, rm: str) -> None:
    arguments = ("generate", "hello", "--lm", lm, *SHORT, "--json", "--reward")
    (row,) = run(*arguments, rm, "--reward-weights", "int4").rows
    assert row["reward_weights"] == "int4"
    assert "reward_weights" not in run(*arguments, rm).rows[0]
    assert "weights='int3' is unknown: use 'int4'" in run(*arguments, rm, "--reward-weights", "int3").error
    assert "needs a TextReward" in run(*arguments, f"text:{rm}", "--reward-weights", "int4").error
    for reward in ("contrastive", "none"):
        refused = run(*arguments, reward, "--reward-weights", "int4")
        assert "--reward-weights belongs to" in refused.error


def test_rounded_language_model(run: Callable, lm: str) -> None:
    arguments = ("generate", "hello", "--lm", lm, *SHORT, "--json", "--reward", "none")
    (row,) = run(*arguments, "--weights", "int8", "--dtype", "bfloat16").rows
    assert row["weights"] == "int8"
    assert "weights" not in run(*arguments).rows[0]
    assert "is torch.float32: use dtype='bfloat16'" in run(*arguments, "--weights", "int8").error
    assert "weights='int3' is unknown: use 'int4', 'int8'" in run(*arguments, "--weights", "int3").error


def test_folder_that_is_no_model(run: Callable, tmp_path: Path) -> None:
    assert str(tmp_path) in run("generate", "hello", "--lm", tmp_path, *SHORT).error


def test_missing_input(run: Callable, tmp_path: Path, lm: str) -> None:
    path = tmp_path / "missing.jsonl"
    error = run("generate", "--input", path, "--output", tmp_path / "out.jsonl", "--lm", lm).error
    assert str(path) in error
    assert not (tmp_path / "out.jsonl").exists()


def test_gzip_that_is_broken(run: Callable, tmp_path: Path, lm: str) -> None:
    path = tmp_path / "prompts.jsonl.gz"
    path.write_bytes(b"\x1f\x8bnonsense")
    assert str(path) in run("generate", "--input", path, "--lm", lm).error


BROKEN = {
    2: '{"prompt": "cut off',
    3: '["prompt"]',
    4: json.dumps({"text": "no prompt"}),
    5: json.dumps({"prompt": ""}),
    6: json.dumps({"prompt": 5}),
    7: json.dumps({"prompt": [{"role": "user"}]}),
    8: json.dumps({"prompt": "x", "k": 0}),
    9: json.dumps({"prompt": "x", "temperature": "hot"}),
    10: json.dumps({"prompt": "x", "seed": 1.5}),
    11: json.dumps({"prompt": "x", "id": "a"}),
    12: json.dumps({"prompt": "x", "id": ["a"]}),
    13: json.dumps({"prompt": "too long " * CONTEXT}),
    14: json.dumps({"prompt": "x", "k": 5000}),
}


def test_broken_lines_are_named_and_the_rest_goes_on(
    run: Callable, prompts_file: Callable, tmp_path: Path, lm: str, rm: str
) -> None:
    good = json.dumps({"prompt": "first", "id": "a"}), json.dumps({"prompt": "last"})
    source = prompts_file(good[0], *BROKEN.values(), good[1])
    output = tmp_path / "out.jsonl"
    outcome = run("generate", "--input", source, "--output", output, "--lm", lm, "--reward", rm, *SHORT)
    assert outcome.code == 2
    assert [row["line"] for row in sorted(read_rows(output), key=lambda row: row["line"])] == [1, 15]
    assert len(outcome.errors) == len(BROKEN)
    for number in BROKEN:
        assert any(f":{number}: " in line or f"line {number}: " in line for line in outcome.errors)


def test_line_that_is_not_utf8(run: Callable, tmp_path: Path, lm: str) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"prompt": "one"}\n{"prompt": "\xff"}\n')
    outcome = run("generate", "--input", source, "--lm", lm, "--reward", "none", *SHORT)
    assert ":2: not UTF-8" in outcome.error
    assert [row["prompt"] for row in outcome.rows] == ["one"]


def test_rows_are_never_overwritten_unasked(
    run: Callable, prompts_file: Callable, tmp_path: Path, lm: str
) -> None:
    source, output = prompts_file({"prompt": "one"}), tmp_path / "out.jsonl"
    args = ("generate", "--input", source, "--output", output, "--lm", lm, "--reward", "none", *SHORT)
    assert run(*args).code == 0
    before = output.read_bytes()
    error = run(*args).error
    assert "--resume" in error
    assert "--overwrite" in error
    assert output.read_bytes() == before
    assert run(*args, "--overwrite", "--seed", 4).code == 0
    assert read_rows(output)[0]["seed"] == 4


@pytest.mark.parametrize(
    ("change", "word"),
    [(("--seed", 1), "seed"), (("--beta", 3), "beta"), (("--max-new-tokens", 3), "max_new_tokens")],
)
def test_resume_never_mixes_two_runs(
    run: Callable, prompts_file: Callable, tmp_path: Path, lm: str, change: tuple, word: str
) -> None:
    source, output = prompts_file({"prompt": "one"}, {"prompt": "two"}), tmp_path / "out.jsonl"
    args = ("generate", "--input", source, "--output", output, "--lm", lm, "--reward", "none", *SHORT)
    assert run(*args).code == 0
    before = output.read_bytes()
    assert word in run(*args, *change, "--resume").error
    prompts_file({"prompt": "another"}, {"prompt": "two"})
    assert "prompt" in run(*args, "--resume").error
    assert output.read_bytes() == before


def test_output_that_is_something_else(
    run: Callable, prompts_file: Callable, tmp_path: Path, lm: str
) -> None:
    source, output = prompts_file({"prompt": "one"}), tmp_path / "out.txt"
    output.write_text("my diary\n", encoding="utf-8")
    args = ("generate", "--input", source, "--output", output, "--lm", lm, "--resume")
    assert f"{output}:1" in run(*args).error
    assert output.read_text(encoding="utf-8") == "my diary\n"


def test_nan_reward_keeps_the_finished_rows(
    run: Callable, prompts_file: Callable, tmp_path: Path, lm: str, nan_rm: str
) -> None:
    # With one candidate the tilde is no candidate; with all of them it is one at the first step.
    source = prompts_file(
        {"prompt": "one", "k": 1, "seed": 1}, {"prompt": "two", "k": 1}, {"prompt": "three", "k": 256}
    )
    output = tmp_path / "out.jsonl"
    args = ("generate", "--input", source, "--output", output, "--lm", lm, "--reward", nan_rm)
    outcome = run(*args, "--max-batch", 1, *SHORT)
    assert "NaN" in outcome.error
    assert "line 3" in outcome.error
    assert "step 0" in outcome.error
    assert "~" in outcome.error
    assert [row["line"] for row in read_rows(output)] == [1, 2]


def test_no_memory_says_what_would_fit(
    run: Callable, prompts_file: Callable, monkeypatch: pytest.MonkeyPatch, lm: str, rm: str
) -> None:
    from rgtg_fast.engine import scheduler

    monkeypatch.setattr(scheduler, "free_bytes", lambda device: 50_000)
    source = prompts_file(*({"prompt": f"prompt {n}"} for n in range(20)))
    error = run("generate", "--input", source, "--lm", lm, "--reward", rm, "--max-batch", 16, *SHORT).error
    assert "max_batch=" in error or "max-batch" in error
    assert "would fit" in error


def test_out_of_memory_is_one_line(run: Callable, monkeypatch: pytest.MonkeyPatch, lm: str) -> None:
    from rgtg_fast.decoder import RewardGuidedDecoder

    def fail(*args: object, **options: object) -> None:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: can't allocate memory"
        )

    monkeypatch.setattr(RewardGuidedDecoder, "generate", fail)
    assert "--max-batch" in run("generate", "hello", "--lm", lm, *SHORT).error


@pytest.mark.skipif(sys.platform == "win32", reason="files are not locked there")
def test_output_of_another_process(run: Callable, prompts_file: Callable, tmp_path: Path, lm: str) -> None:
    import fcntl

    source, output = prompts_file({"prompt": "one"}), tmp_path / "out.jsonl"
    with output.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        error = run("generate", "--input", source, "--output", output, "--resume", "--lm", lm).error
    assert "another process" in error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(run: Callable, prompts_file: Callable, lm: str) -> None:
    source = prompts_file({"prompt": "one"})
    args = ("generate", "--input", source, "--output", "/dev/full", "--lm", lm, "--reward", "none", *SHORT)
    assert "No space left" in run(*args).error
