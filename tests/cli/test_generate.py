"""`rgtg-fast generate`: one prompt, streams, files of prompts."""

import gzip
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from rgtg_fast import Guidance, RewardGuidedDecoder
from tests.cli.support import read_rows, run_until

SHORT = ("--max-new-tokens", 6)


def test_answer_is_the_decoders(run: Callable, lm: str, rm: str) -> None:
    options = ("--k", 4, "--beta", 2, "--temperature", 0.5, "--seed", 7)
    outcome = run("generate", "hello", "--lm", lm, "--reward", rm, *options, *SHORT, "--json")
    assert outcome.code == 0
    (row,) = outcome.rows
    decoder = RewardGuidedDecoder.from_pretrained(lm, reward=rm)
    chat = [{"role": "user", "content": "hello"}]
    expected = decoder.generate([chat], max_new_tokens=6, guidance=Guidance(4, 2.0, 0.5), seed=7)
    assert row["tokens"] == expected[0].tokens
    assert row["text"] == expected[0].text
    assert row["reward"] == pytest.approx(expected[0].reward)
    assert row["finish_reason"] == expected[0].finish_reason
    assert (row["k"], row["beta"], row["temperature"], row["seed"]) == (4, 2.0, 0.5, 7)
    assert row["stats"]["tokens"] >= len(row["tokens"])


def test_plain_answer_is_all_that_stdout_has(run: Callable, lm: str, rm: str) -> None:
    args = ("generate", "hello", "--lm", lm, "--reward", rm, *SHORT)
    text = run(*args, "--json").rows[0]["text"]
    outcome = run(*args)
    assert outcome.code == 0
    assert outcome.out == text + "\n"
    assert "tokens/s" in outcome.err


def test_chat_wraps_and_no_chat_does_not(run: Callable, lm: str) -> None:
    args = ("generate", "hello", "--lm", lm, "--reward", "none", "--temperature", 0, *SHORT, "--json")
    decoder = RewardGuidedDecoder.from_pretrained(lm)
    greedy = Guidance(temperature=0)
    plain = decoder.generate(["hello"], max_new_tokens=6, guidance=greedy)
    chat = decoder.generate([[{"role": "user", "content": "hello"}]], max_new_tokens=6, guidance=greedy)
    assert run(*args, "--no-chat").rows[0]["tokens"] == plain[0].tokens
    assert run(*args, "--chat").rows[0]["tokens"] == chat[0].tokens


def test_model_without_template_takes_plain_prompts(run: Callable, plain_lm: str) -> None:
    outcome = run("generate", "hello", "--lm", plain_lm, "--reward", "none", *SHORT, "--json")
    assert outcome.code == 0
    assert outcome.rows[0]["reward"] is None


def test_contrastive_prompts_are_taken(run: Callable, lm: str) -> None:
    args = ("generate", "hello", "--lm", lm, "--seed", 3, "--beta", 5, *SHORT, "--json")
    one = run(*args, "--better", "You are kind.", "--worse", "You are rude.").rows[0]
    other = run(*args, "--better", "Speak of the sea.", "--worse", "Speak of trees.").rows[0]
    assert (one["better"], one["worse"]) == ("You are kind.", "You are rude.")
    assert one["reward"] != other["reward"]


@pytest.mark.parametrize("seed", [0, 5])
def test_stream_joins_to_the_answer(run: Callable, lm: str, rm: str, seed: int) -> None:
    args = ("generate", "hello", "--lm", lm, "--reward", rm, "--seed", seed, "--max-new-tokens", 20)
    text = run(*args, "--json").rows[0]["text"]
    assert run(*args, "--stream").out == text + "\n"
    pieces = run(*args, "--stream", "--json").rows
    assert "".join(piece["text"] for piece in pieces) == text
    assert [piece["finish_reason"] is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]


def test_stop_ends_the_answer_before_it(run: Callable, lm: str) -> None:
    args = (
        "generate",
        "hello",
        "--lm",
        lm,
        "--reward",
        "none",
        "--no-chat",
        "--max-new-tokens",
        40,
        "--json",
    )
    whole = next(
        row["text"] for seed in range(20) if len((row := run(*args, "--seed", seed).rows[0])["text"]) > 9
    )
    seed = next(s for s in range(20) if run(*args, "--seed", s).rows[0]["text"] == whole)
    stop = whole[5:7]
    row = run(*args, "--seed", seed, "--stop", stop, "--stop", "never to be seen").rows[0]
    assert row["text"] == whole[: whole.index(stop)]
    assert row["finish_reason"] == "stop"


def test_prompt_from_stdin(run_process: Callable, lm: str) -> None:
    args = ("--lm", lm, "--reward", "none", "--temperature", 0, *SHORT, "--json")
    piped = run_process("generate", "-", *args, stdin="hello")
    assert piped.code == 0, piped.err
    assert piped.rows[0]["prompt"] == "hello"


def test_file_of_prompts(run: Callable, prompts_file: Callable, tmp_path: Path, lm: str, rm: str) -> None:
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    source = prompts_file(
        {"prompt": "one"},
        "",
        {"prompt": chat, "id": "b", "seed": 9, "k": 3, "beta": 0.5, "temperature": 0},
        {"prompt": "three", "id": 3, "seed": None, "k": None},
        {"prompt": "one"},
        {"prompt": [5, 6, 7]},
    )
    output = tmp_path / "new folder" / "out.jsonl"
    outcome = run("generate", "--input", source, "--output", output, "--lm", lm, "--reward", rm, *SHORT)
    assert outcome.code == 0, outcome.err
    assert outcome.out == ""
    rows = {row["line"]: row for row in read_rows(output)}
    assert sorted(rows) == [1, 3, 4, 5, 6]
    assert rows[3]["id"] == "b"
    assert rows[3]["prompt"] == chat
    assert (rows[3]["seed"], rows[3]["k"], rows[3]["beta"], rows[3]["temperature"]) == (9, 3, 0.5, 0)
    assert (rows[4]["id"], rows[4]["seed"], rows[4]["k"]) == (3, 0, 10)
    # The same prompt with the same settings has the same answer, wherever it stands.
    assert rows[1]["tokens"] == rows[5]["tokens"]
    alone = run("generate", "one", "--lm", lm, "--reward", rm, *SHORT, "--json").rows[0]
    assert rows[1]["tokens"] == alone["tokens"]


def test_file_to_stdout(run: Callable, prompts_file: Callable, lm: str) -> None:
    source = prompts_file({"question": "one"}, {"question": "two"})
    outcome = run(
        "generate", "--input", source, "--field", "question", "--lm", lm, "--reward", "none", *SHORT
    )
    assert outcome.code == 0
    assert sorted(row["prompt"] for row in outcome.rows) == ["one", "two"]


def test_gzip_is_read(run: Callable, tmp_path: Path, lm: str) -> None:
    source = tmp_path / "prompts.jsonl.gz"
    source.write_bytes(gzip.compress(b'{"prompt": "one"}\n{"prompt": "two"}'))
    outcome = run("generate", "--input", source, "--lm", lm, "--reward", "none", *SHORT)
    assert len(outcome.rows) == 2


def test_resume_completes_a_truncated_file(
    run: Callable, prompts_file: Callable, tmp_path: Path, lm: str, rm: str
) -> None:
    source = prompts_file(*({"prompt": f"prompt {n}", "id": n} for n in range(9)))
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    args = ("generate", "--input", source, "--lm", lm, "--reward", rm, *SHORT)
    assert run(*args, "--output", whole).code == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:4]) + lines[4][: len(lines[4]) // 2])
    outcome = run(*args, "--output", output, "--resume")
    assert outcome.code == 0, outcome.err
    rows, expected = ({row["id"]: row for row in read_rows(path)} for path in (output, whole))
    assert sorted(rows) == sorted(expected) == list(range(9))
    for name, row in rows.items():
        # Rewards differ in their last digits with the number of rows in the batch.
        assert row.pop("reward") == pytest.approx(expected[name].pop("reward"), abs=1e-5)
        assert row == expected[name]
    assert len(read_rows(output)) == 9
    # A run that is complete has nothing left to do and changes nothing.
    before = output.read_bytes()
    assert run(*args, "--output", output, "--resume").code == 0
    assert output.read_bytes() == before


def test_resume_starts_where_there_is_no_file(
    run: Callable, prompts_file: Callable, tmp_path: Path, lm: str
) -> None:
    source, output = prompts_file({"prompt": "one"}), tmp_path / "out.jsonl"
    args = ("generate", "--input", source, "--output", output, "--resume", "--lm", lm, "--reward", "none")
    assert run(*args, *SHORT).code == 0
    assert len(read_rows(output)) == 1


def test_killed_run_resumes(run: Callable, prompts_file: Callable, tmp_path: Path, lm: str, rm: str) -> None:
    source = prompts_file(*({"prompt": f"prompt {n}", "id": n} for n in range(20)))
    output = tmp_path / "out.jsonl"
    args = ("generate", "--input", source, "--output", output, "--lm", lm, "--reward", rm)
    args = (*args, "--max-new-tokens", 8, "--max-batch", 4)
    assert run_until("iterate", 5, signal.SIGKILL, *args).code == -signal.SIGKILL
    saved = read_rows(output)
    assert len(saved) == 5
    resumed = run(*args, "--resume")
    assert resumed.code == 0, resumed.err
    rows = read_rows(output)
    assert rows[:5] == saved
    assert sorted(row["id"] for row in rows) == list(range(20))


def test_interrupted_run_ends_with_130(prompts_file: Callable, tmp_path: Path, lm: str, rm: str) -> None:
    source = prompts_file(*({"prompt": f"prompt {n}"} for n in range(8)))
    output = tmp_path / "out.jsonl"
    args = ("generate", "--input", source, "--output", output, "--lm", lm, "--reward", rm, *SHORT)
    ended = run_until("iterate", 2, signal.SIGINT, *args)
    assert ended.code == 130, ended.err
    assert "Traceback" not in ended.err
    assert len(read_rows(output)) == 2
