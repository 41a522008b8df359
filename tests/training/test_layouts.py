"""Preference data in the forms that people have: each row is read right, or counted under a name and said."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgtg_fast import RGTGError
from rgtg_fast.training.data import PreferencePair, load_pairs
from rgtg_fast.training.data.chats import parsed

needs_pandas = pytest.mark.skipif(
    importlib.util.find_spec("pandas") is None or importlib.util.find_spec("pyarrow") is None,
    reason="the package `pandas` or `pyarrow` is not installed",
)
USER = {"role": "user", "content": "What colour is the sky?"}
SYSTEM = {"role": "system", "content": "Answer from this text only: the sky is green."}
HH = "\n\nHuman: What colour is the sky?\n\nAssistant:"
# Quotes, braces and line breaks that a reader of Python's form has to keep.
HARD = "It's \"green\"\nyes {'a': 1}\n {'b'}"


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def one(*rows: dict[str, Any], **arguments: Any) -> tuple[Any, str, str]:
    pairs, report = load_pairs(list(rows), **arguments)
    assert (report.kept, report.dropped) == (1, len(rows) - 1)
    return pairs[0].prompt, pairs[0].chosen, pairs[0].rejected


def texts(pairs: list[PreferencePair]) -> list[tuple[Any, str, str]]:
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]


# Chats as texts


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("write", [repr, json.dumps, lambda value: "\n " + json.dumps(value, indent=2)])
def test_chats_in_cells(tmp_path: Path, write: Any) -> None:
    row = {"prompt": "q", "chosen": write([assistant(HARD)]), "rejected": write([assistant("blue")])}
    asked = {"role": "user", "content": "q"}
    assert texts(load_pairs(write_csv(tmp_path / "a.csv", [row]))[0]) == [([asked], HARD, "blue")]
    assert one(row) == ([asked], HARD, "blue")


def test_a_cell_that_looks_like_a_chat_and_is_none_is_counted(tmp_path: Path) -> None:
    good = {"prompt": "q", "chosen": "c", "rejected": "r"}
    ran = tmp_path / "ran"
    bad = [
        "[{'role': 'assistant', 'content': 'cut by a spreadsh",
        "[{'role': " + "[" * 50_000,
        f"[{{'role': 'assistant', 'content': open({str(ran)!r}, 'w')}}]",
        "[{'role': 'assistant', 'content': 3",
    ]
    path = write_csv(tmp_path / "a.csv", [{**good, "chosen": cell} for cell in bad] + [good])
    pairs, report = load_pairs(path)
    assert texts(pairs) == [("q", "c", "r")]
    assert report.malformed == len(bad)
    assert "'chosen' looks like chat messages and cannot be read as such" in report.first_malformed
    assert not ran.exists()


def test_answers_that_are_json_stay_texts(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": '{"a": 1}', "rejected": '{"content": "x"}'}
    assert texts(load_pairs(write_csv(tmp_path / "a.csv", [row]))[0]) == [tuple(row.values())]
    assert one(row) == tuple(row.values())


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none()), min_size=1, max_size=3))
def test_pythons_and_numpys_forms_are_read_back(values: list[dict[str, Any]]) -> None:
    assert parsed(repr(values)) == values
    # numpy writes an array of objects without commas.
    assert parsed("[" + "\n ".join(map(repr, values)) + "]") == values


def test_cells_beyond_the_columns_are_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfprompt,chosen,rejected\r\nq,Yes, sure,no\r\nq,only\r\nq,c,r\r\n")
    pairs, report = load_pairs(path)
    assert texts(pairs) == [("q", "c", "r")]
    assert report.malformed == 2
    assert report.first_malformed == "row 0: 4 cells and 3 columns: quote cells"
    path.write_text("prompt,chosen,chosen,rejected\nq,a,b,c\n")
    with pytest.raises(RGTGError, match="has two columns 'chosen'"):
        load_pairs(path)


# Tables


@needs_pandas
def test_tables_and_what_pandas_writes(tmp_path: Path) -> None:
    import pandas
    import pyarrow

    rows = [
        {"prompt": USER["content"], "chosen": [USER, assistant(HARD)], "rejected": [USER, assistant("r")]}
    ]
    expected = [([USER], HARD, "r")]
    frame = pandas.DataFrame(rows)
    frame.to_csv(tmp_path / "lists.csv")
    frame.to_parquet(tmp_path / "a.parquet")
    arrays = pandas.read_parquet(tmp_path / "a.parquet")
    arrays.to_csv(tmp_path / "arrays.csv", index=False)
    frame.to_json(tmp_path / "columns.json")
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    table = pyarrow.Table.from_pylist(rows)
    for name, opened in (("file.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
        with pyarrow.OSFile(str(tmp_path / name), "wb") as file, opened(file, table.schema) as writer:
            writer.write_table(table)
    for source in (frame, arrays, table, {name: [row[name] for row in rows] for name in rows[0]}):
        assert texts(load_pairs(source)[0]) == expected
    for path in sorted(tmp_path.iterdir()):
        pairs, report = load_pairs(path)
        assert texts(pairs) == expected, path
        assert report.lines() == ["1 of 1 pairs kept"], path
    # Cells without a value.
    plain = pandas.DataFrame(
        {"prompt": ["q"] * 3, "chosen": ["c", None, float("nan")], "rejected": ["r"] * 3}
    )
    pairs, report = load_pairs(plain.assign(system=float("nan"), more=pandas.NA))
    assert (texts(pairs), report.malformed, report.unread) == ([("q", "c", "r")], 2, ())


@pytest.mark.parametrize(
    "rows",
    [
        {"data": [{"prompt": "q", "chosen": "c", "rejected": "r"}]},
        {"prompt": "q", "chosen": "c", "rejected": "r"},
    ],
)
def test_json_files_with_one_object(tmp_path: Path, rows: Any) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=1))
    assert texts(load_pairs(path)[0]) == [("q", "c", "r")]


@pytest.mark.parametrize("source", [5, None, 2.5])
def test_what_is_no_source_of_rows_is_refused(source: Any) -> None:
    with pytest.raises(RGTGError, match="is not a source of rows: pass a file"):
        load_pairs(source)


# System messages


@pytest.mark.parametrize(
    "row",
    [
        {"system": SYSTEM["content"], "prompt": USER["content"], "chosen": "c", "rejected": "r"},
        {"System Prompt": SYSTEM["content"], "Question": USER["content"], "Chosen": "c", "Rejected": "r"},
        {"system": SYSTEM["content"], "prompt": HH, "chosen": HH + " c", "rejected": HH + " r"},
        {"system": SYSTEM["content"], "chosen": HH + " c", "rejected": HH + " r"},
        {"system": [SYSTEM], "prompt": [SYSTEM, USER], "chosen": "c", "rejected": "r"},
        {"prompt": [SYSTEM, USER], "chosen": [USER, assistant("c")], "rejected": [USER, assistant("r")]},
        {
            "prompt": [USER],
            "chosen": [SYSTEM, USER, assistant("c")],
            "rejected": [SYSTEM, USER, assistant("r")],
        },
        {"prompt": [SYSTEM, USER], "chosen": HH + " c", "rejected": HH + " r"},
        {
            "conversations": [
                {"from": "system", "value": SYSTEM["content"]},
                {"from": "human", "value": USER["content"]},
            ],
            "chosen": {"from": "gpt", "value": "c"},
            "rejected": {"from": "gpt", "value": "r"},
        },
    ],
)
def test_system_messages_reach_the_prompt(row: dict[str, Any]) -> None:
    assert one(row) == ([SYSTEM, USER], "c", "r")


def test_a_system_message_of_a_text() -> None:
    row = {"system": "Be brief.", "prompt": "q", "chosen": "c", "rejected": "r"}
    assert one(row, chat=False) == ("Be brief.\n\nq", "c", "r")
    assert one({**row, "prompt": HH}, chat=False)[0] == "Be brief." + HH
    info = {"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0, "system": "S"}
    assert one(info)[0] == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "POST: p\nTL;DR:"},
    ]


def test_two_system_messages_are_two_prompts() -> None:
    good = {"prompt": "q", "chosen": "c", "rejected": "r", "system": ""}
    bad = {"prompt": [SYSTEM, USER], "chosen": "c", "rejected": "r", "system": "Another."}
    assert load_pairs([good, bad])[1].different_prompts == 1


# Prompts beside dialogues


@pytest.mark.parametrize("prompt", [HH, USER["content"], f" {USER['content']}\n", [USER], "", None])
@pytest.mark.parametrize("chat", [True, False])
def test_whole_dialogues_beside_a_prompt(prompt: Any, chat: bool) -> None:
    row = {"prompt": prompt, "chosen": HH + " Yes.", "rejected": HH + " No."}
    assert one(row, chat=chat) == (([USER], "Yes.", "No.") if chat else (HH, " Yes.", " No."))


def test_answers_of_several_turns_and_parts_of_a_prompt() -> None:
    second = {"role": "user", "content": "Really?"}
    turns = [USER, assistant("Green."), second]
    chats = {"chosen": [*turns, assistant("c")], "rejected": [*turns, assistant("r")]}
    for prompt in (USER["content"], [USER], "Really?", turns):
        assert one({"prompt": prompt, **chats}) == (turns, "c", "r")
    # The prompt holds the first turn, the answers all others.
    rest = {"chosen": [*turns[1:], assistant("c")], "rejected": [*turns[1:], assistant("r")]}
    assert one({"prompt": USER["content"], **rest}) == (turns, "c", "r")
    assert one({"messages": [*turns, assistant("c")], "chosen": "c", "rejected": "r"}) == (turns, "c", "r")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What is 2+2?", "chosen": [USER, assistant("4")], "rejected": [USER, assistant("5")]},
        {"prompt": "What is 2+2?", "chosen": HH + " 4", "rejected": HH + " 5"},
        {"prompt": USER["content"], "chosen": HH + " 4", "rejected": "5"},
        {"prompt": [USER], "chosen": [SYSTEM, USER, assistant("c")], "rejected": [USER, assistant("r")]},
        {
            "prompt": [USER, assistant("x")],
            "chosen": [assistant("y"), USER, assistant("c")],
            "rejected": [assistant("y"), USER, assistant("r")],
        },
    ],
)
def test_a_prompt_that_is_not_the_dialogues_is_counted(row: dict[str, Any]) -> None:
    good = {"prompt": USER["content"], "chosen": "c", "rejected": "r"}
    pairs, report = load_pairs([good, row])
    assert (len(pairs), report.different_prompts) == (1, 1)
    assert "1 dropped: the dialogues differ before the last answer, or from the prompt" in report.lines()


def test_answers_that_repeat_their_prompt() -> None:
    prompt = "Question: Is it?\nAnswer:"
    rows = [{"prompt": prompt, "chosen": f"{prompt} Yes {i}.", "rejected": f"{prompt} No."} for i in range(3)]
    other = {"prompt": "p", "chosen": "not the prompt", "rejected": "r"}
    pairs, report = load_pairs([*rows, other])
    assert texts(pairs) == [(prompt, f" Yes {i}.", " No.") for i in range(3)]
    assert (report.prompts_removed, report.different_prompts) == (3, 1)
    assert "3 kept with answers that began with the prompt, which was taken off" in report.lines()
    # One of many rows may begin so by chance, and keeps its answers; a word that goes on is not a prompt.
    others = [{**other, "chosen": f"c{i}"} for i in range(2)]
    pairs, report = load_pairs([{"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi you"}, *others])
    assert (pairs[0].chosen, report.prompts_removed, report.prompts_repeated) == ("Hi there", 0, 1)
    assert one({"prompt": "Hi", "chosen": "History", "rejected": "Hide"}) == ("Hi", "History", "Hide")


# Names of columns, scores, and what nothing reads


def test_other_names_and_columns_that_nothing_reads() -> None:
    row = {
        "\ufeffPrompt ": "q",
        "Chosen-Response": "c",
        "rejected_response": "r",
        "history": [["a", "b"]],
        "id": 3,
    }
    pairs, report = load_pairs([row])
    assert texts(pairs) == [("q", "c", "r")]
    assert report.lines() == ["1 of 1 pairs kept", "columns that are not read: 'history', 'id'"]
    assert report.as_dict()["unread"] == ["history", "id"]
    good = {"instruction": "q", "input": "", "chosen": "c", "rejected": "r"}
    assert one(good, {**good, "input": "more"}) == ("q", "c", "r")


def test_scores_against_the_choice_are_said() -> None:
    row = {"prompt": "q", "chosen": "c", "rejected": "r", "score_chosen": 2.0, "score_rejected": "9"}
    assert load_pairs([row])[1].lines()[1:] == ["1 kept with a chosen answer of the lower score"]
    assert load_pairs([{**row, "score_chosen": 9.5}])[1].lines() == ["1 of 1 pairs kept"]
    assert load_pairs([{**row, "score_chosen": "good"}])[1].lines() == ["1 of 1 pairs kept"]


def test_contents_in_parts_and_characters_that_are_none() -> None:
    part = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    row = {"prompt": [USER], "chosen": [{"role": "assistant", "content": part}], "rejected": [assistant("r")]}
    picture = {"role": "assistant", "content": [{"type": "image", "url": "x"}]}
    half = {"prompt": "q\ud83d", "chosen": "c", "rejected": "r"}
    pairs, report = load_pairs([row, {**row, "chosen": [picture]}, half])
    assert (texts(pairs), report.malformed) == ([([USER], "one two", "r")], 2)


# Where answers end


@pytest.mark.parametrize(
    ("answer", "left", "ended"),
    [
        ("c</s>", "c", True),
        ("c <|im_end|>\n", "c", True),
        ("c<|eot_id|><|endoftext|>", "c", True),
        ("a <s>b</s>", "a <s>b</s>", None),
        ("c </s> more", "c </s> more", None),
    ],
)
def test_texts_of_end_tokens_are_taken_off(answer: str, left: str, ended: bool | None) -> None:
    (pair,), report = load_pairs([{"prompt": "q", "chosen": answer, "rejected": "r"}])
    assert (pair.chosen, pair.ended) == (left, (ended, None))
    assert report.end_texts == bool(ended)
    chats = {"prompt": [USER], "chosen": [assistant(answer)], "rejected": [assistant("r")]}
    assert load_pairs([chats])[0][0].chosen == left


def test_answers_without_text_but_an_end_are_empty_or_identical() -> None:
    rows = [
        {"prompt": "q", "chosen": a, "rejected": b} for a, b in (("</s>", "r"), ("a</s>", "a"), ("c", "r"))
    ]
    assert (load_pairs(rows)[1].empty, load_pairs(rows)[1].identical) == (1, 1)


def test_what_the_data_say_of_the_end() -> None:
    row = {"prompt": "q", "rejected": "r"}
    rows: list[dict[str, Any]] = [
        {**row, "chosen": "c0", "finish_reason": "length"},
        {**row, "chosen": "c1", "finish_reason": "eos", "rejected_finish_reason": "MAX_TOKENS"},
        {**row, "chosen": "c2", "chosen_finish_reason": "stop", "rejected_finish_reason": float("nan")},
        {**row, "chosen": [{**assistant("c3"), "finish_reason": "length"}], "rejected": [assistant("r")]},
        {**row, "chosen": "c4", "finish_reason": "crashed"},
        {**row, "chosen": "c5</s>", "finish_reason": "length"},
    ]
    pairs, report = load_pairs(rows)
    expected = [(False, False), (True, False), (True, None), (False, None), (True, False)]
    assert [pair.ended for pair in pairs] == expected
    assert report.malformed == 1
    assert "finish_reason='crashed' is not one of eos, stop" in report.first_malformed
    for told, value in (("yes", True), ("no", False)):
        pairs, _ = load_pairs(rows, answers_ended=told)
        assert [pair.ended for pair in pairs] == [(value, value)] * 6
    with pytest.raises(RGTGError, match="answers_ended='maybe' is unknown: use one of auto, yes, no"):
        load_pairs(rows, answers_ended="maybe")
