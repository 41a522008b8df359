"""Preference pairs: every layout and format, every drop counted, splits without leakage, the decoder's own ids."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rgtg_fast import Prefix, RewardGuidedDecoder, RGTGError, SequenceReward
from rgtg_fast.models.prompts import Prompt
from rgtg_fast.training.data import (
    DataReport,
    PreferencePair,
    hh_messages,
    load_pairs,
    split_by_prompt,
    tokenize_pairs,
)
from tests.conftest import WORDS, make_lm, make_rm, make_tokenizer

needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="the package `datasets` is not installed"
)
ROWS = [
    {"prompt": "w1 w2", "chosen": "w3 w4", "rejected": "w5"},
    {"prompt": "w6", "chosen": "w7", "rejected": "w8 w9 w10"},
]
USER = {"role": "user", "content": "How are you?"}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def texts(pairs: list[PreferencePair]) -> list[tuple[Any, str, str]]:
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]


def one(row: dict[str, Any], **arguments: Any) -> tuple[Any, str, str]:
    pairs, report = load_pairs([row], **arguments)
    assert (report.read, report.kept) == (1, 1)
    assert pairs[0].index == 0
    return texts(pairs)[0]


# Layouts


def test_plain_texts_stay_as_they_are() -> None:
    row = {"prompt": "Name a colour:", "chosen": " red\n", "rejected": "Seven", "subset": "x"}
    assert one(row) == ("Name a colour:", " red\n", "Seven")


def test_turns_in_the_prompt_become_chat_messages() -> None:
    prompt = "\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHow are you?\n\nHuman: Fine\n\nAssistant:"
    messages = [
        {"role": "user", "content": "Hi!"},
        assistant("Hello.\n\nHow are you?"),
        {"role": "user", "content": "Fine"},
    ]
    assert one({"prompt": prompt, "chosen": "Good.", "rejected": "Bad."}) == (messages, "Good.", "Bad.")
    assert one({"prompt": prompt, "chosen": "Good. ", "rejected": "Bad."}, chat=False) == (
        prompt,
        " Good.",
        " Bad.",
    )


def test_plain_with_messages() -> None:
    chats = ([assistant("Good.")], [assistant("Bad.")])
    for prompt in ("How are you?", [USER]):
        row = {"prompt": prompt, "chosen": chats[0], "rejected": chats[1]}
        assert one(row) == ([USER], "Good.", "Bad.")
    # Whole dialogues beside the prompt's text, as UltraFeedback has them.
    row = {"prompt": "How are you?", "chosen": [USER, *chats[0]], "rejected": [USER, *chats[1]]}
    assert one(row) == ([USER], "Good.", "Bad.")
    assert one({"prompt": [USER], "chosen": "Good.", "rejected": "Bad."}) == ([USER], "Good.", "Bad.")


def test_dialogues_that_share_all_but_the_last_answer() -> None:
    before = "\n\nHuman: How are you?\n\nAssistant: Well.\n\nHuman: Really?\n\nAssistant:"
    row = {"chosen": before + " Yes.\n\nThank you.", "rejected": before + " No."}
    messages = [USER, assistant("Well."), {"role": "user", "content": "Really?"}]
    assert one(row) == (messages, "Yes.\n\nThank you.", "No.")
    assert one(row, chat=False) == (before, " Yes.\n\nThank you.", " No.")
    chats = {"chosen": [USER, assistant("Good.")], "rejected": [USER, assistant("Bad.")]}
    assert one(chats) == ([USER], "Good.", "Bad.")


def test_summary_comparisons() -> None:
    info = {"id": "t3_1", "post": "My cat left. ", "title": "Cat", "subreddit": "pets", "site": "x"}
    summaries = [{"text": " Cat gone.", "policy": "a"}, {"text": "A cat.", "policy": "b"}]
    prompt = "SUBREDDIT: r/pets\nTITLE: Cat\nPOST: My cat left.\nTL;DR:"
    assert one({"info": info, "summaries": summaries, "choice": 0}) == (prompt, " Cat gone.", " A cat.")
    assert one({"info": info, "summaries": summaries, "choice": 1}) == (prompt, " A cat.", " Cat gone.")
    columns = {"text": ["A cat.", " Cat gone."], "policy": ["a", "b"]}
    assert one({"info": info, "summaries": columns, "choice": 0}) == (prompt, " A cat.", " Cat gone.")
    news = {"post": None, "title": "Rain", "subreddit": None, "article": "It rains."}
    assert one({"info": news, "summaries": summaries, "choice": 1})[0] == (
        "TITLE: Rain\nARTICLE: It rains.\nTL;DR:"
    )


def test_hh_messages() -> None:
    assert hh_messages("What is it?") is None
    assert hh_messages("He said:\n\nHuman: no\n\nAssistant:") is None
    assert hh_messages("\n\nAssistant: I begin.\n\nHuman: No.") is None
    assert hh_messages("\n\nHuman: a: b\n\nc") == [{"role": "user", "content": "a: b\n\nc"}]
    # Some dialogues have two turns of one speaker in a row, which many chat templates refuse.
    assert hh_messages("\n\nHuman: a\n\nHuman: b\n\nAssistant:") == [{"role": "user", "content": "a\n\nb"}]
    assert hh_messages("\n\nHuman: a\n\n\nAssistant: Human: b\n\nHuman:c\n\nAssistant: ") == [
        {"role": "user", "content": "a"},
        assistant("Human: b"),
        {"role": "user", "content": "c"},
    ]


turns = st.text(st.characters(codec="utf-8"), min_size=1).filter(
    lambda text: text.strip() == text and "\n\nHuman:" not in text and "\n\nAssistant:" not in text
)


@settings(deadline=None)
@given(st.lists(turns, min_size=1, max_size=5))
def test_hh_messages_keep_every_turn(contents: list[str]) -> None:
    speakers = ["Human", "Assistant"] * len(contents)
    dialogue = "".join(f"\n\n{who}: {text}" for who, text in zip(speakers, contents, strict=False))
    end = "" if len(contents) % 2 == 0 else "\n\nAssistant:"
    messages = hh_messages(dialogue + end)
    assert messages is not None
    assert [message["content"] for message in messages] == contents
    assert [message["role"] for message in messages] == (["user", "assistant"] * 3)[: len(contents)]


# Formats


def write(path: Path, rows: list[Any]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(
                {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows
            )
    elif path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        pyarrow = pytest.importorskip("pyarrow")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(lines, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet"])
@pytest.mark.parametrize("layout", ["plain", "messages", "tldr"])
def test_files(tmp_path: Path, name: str, layout: str) -> None:
    info = {"post": "My cat\nleft.", "title": "Cat", "subreddit": "pets"}
    rows: list[Any] = {
        "plain": [{"prompt": 'A "quoted", naïve\nprompt', "chosen": "c", "rejected": "r"}],
        "messages": [{"chosen": [USER, assistant("Good.")], "rejected": [USER, assistant("Bad.")]}],
        "tldr": [{"info": info, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}],
    }[layout]
    pairs, report = load_pairs(write(tmp_path / name, rows))
    assert (report.read, report.kept) == (1, 1)
    assert texts(pairs) == texts(load_pairs(rows)[0])


def test_json_lines_under_another_name_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes("\ufeff".encode() + b"\n".join(json.dumps(row).encode() for row in ROWS))
    assert len(load_pairs(path)[0]) == 2


@needs_datasets
def test_data_sets(tmp_path: Path) -> None:
    import datasets

    expected = texts(load_pairs(ROWS)[0])
    loaded = datasets.Dataset.from_list(ROWS)
    assert texts(load_pairs(loaded)[0]) == expected
    loaded.save_to_disk(tmp_path / "saved")
    assert texts(load_pairs(tmp_path / "saved")[0]) == expected
    both = datasets.DatasetDict({"train": loaded, "test": loaded.select([1])})
    with pytest.raises(RGTGError, match="has the splits 'train', 'test': pass one of them"):
        load_pairs(both)
    both.save_to_disk(tmp_path / "both")
    assert texts(load_pairs(tmp_path / "both", split="test")[0]) == expected[1:]
    with pytest.raises(RGTGError, match="has the splits train, test, not 'dev'"):
        load_pairs(tmp_path / "both", split="dev")
    # A folder as it is downloaded from the hub: data files without a script.
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", ROWS)
    assert texts(load_pairs(tmp_path / "folder")[0]) == expected


# Drops


def test_every_drop_is_counted() -> None:
    good = {"prompt": "w1", "chosen": "w2", "rejected": "w3"}
    rows: list[Any] = [
        good,
        dict(good),
        {**good, "rejected": "w2 "},
        {**good, "chosen": " \n"},
        {**good, "prompt": ""},
        {"prompt": "w1", "chosen": "w2"},
        {**good, "chosen": 7},
        {**good, "chosen": [assistant("w2")]},
        "no object",
        {
            "prompt": "w1",
            "chosen": [USER, assistant("w2")],
            "rejected": [{**USER, "content": "w9"}, assistant("w3")],
        },
        {"prompt": "w1", "chosen": [USER], "rejected": [assistant("w3")]},
        {**good, "prompt": "w4"},
    ]
    pairs, report = load_pairs(rows)
    assert [pair.index for pair in pairs] == [0, 11]
    assert report == DataReport(
        read=12, kept=2, duplicates=1, identical=1, empty=2, malformed=5, different_prompts=1
    )
    assert report.kept + report.dropped == report.read
    assert report.first_malformed == "row 5: no 'rejected' (fields: 'prompt', 'chosen')"
    lines = report.lines()
    assert lines[0] == "2 of 12 pairs kept"
    assert "5 dropped: not in the layout (first: row 5: no 'rejected' (fields: 'prompt', 'chosen'))" in lines
    assert report.as_dict()["duplicates"] == 1


@pytest.mark.parametrize(
    ("row", "counter"),
    [
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}, 1),
        ({"chosen": "a", "rejected": "b"}, 0),
        (
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c",
                "rejected": "\n\nHuman: a\n\nAssistant: d",
            },
            0,
        ),
        ({"chosen": "a\n\nAssistant: b", "rejected": "a\n\nAssistant: d"}, 0),
        ({"chosen": [assistant("b")], "rejected": [assistant("d")]}, 0),
    ],
)
def test_broken_dialogues(row: dict[str, Any], counter: int) -> None:
    good = {"chosen": [USER, assistant("w2")], "rejected": [USER, assistant("w3")]}
    _, report = load_pairs([good, row])
    assert (report.malformed, report.different_prompts) == (1 - counter, counter)


@pytest.mark.parametrize(
    "change",
    [
        {"choice": 2},
        {"choice": None},
        {"summaries": [{"text": "a"}]},
        {"summaries": "a"},
        {"summaries": 5},
        {"summaries": {"text": "ab"}},
        {"info": "post"},
        {"info": {}},
    ],
)
def test_broken_comparisons(change: dict[str, Any]) -> None:
    good = {"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}
    _, report = load_pairs([good, {**good, **change}])
    assert (report.kept, report.malformed) == (1, 1)


def test_lines_that_are_no_json_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{broken\n\n[1]\n" + json.dumps(ROWS[1]) + "\n", encoding="utf-8")
    pairs, report = load_pairs(path)
    assert (report.read, report.kept, report.malformed) == (4, 2, 2)
    assert report.first_malformed.startswith("row 1: not JSON (")
    assert [pair.index for pair in pairs] == [0, 3]


def test_reports_of_two_stages_add_up() -> None:
    first = DataReport(read=10, kept=8, empty=1, malformed=1, first_malformed="row 3: no")
    second = DataReport(read=8, kept=5, too_long=1, short=2, truncated=2)
    both = first + second
    assert both == DataReport(read=10, kept=5, empty=1, malformed=1, too_long=1, short=2, truncated=2)
    assert both.kept + both.dropped == both.read
    assert both.first_malformed == "row 3: no"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "cannot read .*none.jsonl: No such file"),
        ("a.txt", b"x", "is in no known format: use .jsonl, .json"),
        ("a.jsonl", b"", "has no rows: name a file"),
        ("a.jsonl", b'{"a": 1}\n', "have the fields 'a': preference pairs have prompt, chosen"),
        ("a.jsonl", b"{\n", r"no pairs are left of the 1 in .*: 1 dropped: not in the layout \(first: row 0"),
        ("a.jsonl", b"\xff\xfe\n", r"is not UTF-8 \(byte 0\)"),
        ("a.json", b"[{", "is not JSON"),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-6], "cannot read .*ended before"),
        ("a.parquet", b"PAR", "is not Parquet|need pyarrow"),
        ("a.csv", b'a,b\n"x', "is not CSV"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RGTGError, match=message) as caught:
        load_pairs(path)
    assert "\n" not in str(caught.value)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(RGTGError, match="layout='x' is unknown"):
        load_pairs(ROWS, "x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(RGTGError, match="no pairs are left of the 2 in the data: 2 dropped: not in the"):
        load_pairs(ROWS, "tldr")
    with pytest.raises(RGTGError, match="'none/of/these' does not exist"):
        load_pairs("none/of/these")


# Split


def chat_pair(first: str, second: str, index: int) -> PreferencePair:
    prompt = [{"role": "user", "content": first}, assistant("ok"), {"role": "user", "content": second}]
    return PreferencePair(prompt, "a", "b", index)


@settings(deadline=None)
@given(
    openings=st.lists(st.integers(0, 40), min_size=2, max_size=120).filter(lambda x: len(set(x)) > 1),
    share=st.floats(0.01, 0.9),
    seed=st.integers(0, 5),
)
def test_no_opening_is_on_both_sides(openings: list[int], share: float, seed: int) -> None:
    pairs = [chat_pair(f"q{o}", f"next {i}", i) for i, o in enumerate(openings)]
    train, held_out = split_by_prompt(pairs, share, seed)
    assert train
    assert held_out
    assert sorted(p.index for p in train + held_out) == list(range(len(pairs)))
    assert [p.index for p in train] == sorted(p.index for p in train)
    assert not {p.opening for p in train} & {p.opening for p in held_out}
    largest = max(openings.count(o) for o in openings)
    assert abs(len(held_out) - share * len(pairs)) <= largest
    again = split_by_prompt(pairs[::-1], share, seed)
    assert {p.index for p in again[1]} == {p.index for p in held_out}


def test_split_follows_its_seed_and_refuses_what_cannot_be_split() -> None:
    pairs = [chat_pair(f"q{i}", "x", i) for i in range(50)]
    sides = {tuple(p.index for p in split_by_prompt(pairs, 0.2, seed)[1]) for seed in range(4)}
    assert len(sides) == 4
    assert all(len(side) == 10 for side in sides)
    assert split_by_prompt(pairs, 0) == (pairs, [])
    with pytest.raises(RGTGError, match=r"held_out=1 is not in \[0, 1\)"):
        split_by_prompt(pairs, 1)
    with pytest.raises(RGTGError, match="the 2 pairs have 1 opening prompt and a split by prompt needs 2"):
        split_by_prompt([chat_pair("q", "a", 0), chat_pair("q", "b", 1)])


def test_openings() -> None:
    assert PreferencePair(" TL;DR: ", "a", "b", 0).opening == "TL;DR:"
    assert chat_pair(" one ", "two", 0).opening == "one"
    # The same dialogue as text: a split must not depend on how the model reads it.
    text = "\n\nHuman: one\n\nAssistant: ok\n\nHuman: two\n\nAssistant:"
    assert PreferencePair(text, "a", "b", 0).opening == "one"
    assert PreferencePair([assistant("I begin")], "a", "b", 0).opening == "I begin"


# Token ids


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("template", [None, "{% for m in messages %}w9 {{ m.content }} {% endfor %}w8"])
def test_training_gives_the_reward_model_the_ids_that_decoding_gives_it(template: str | None) -> None:
    """The guide's own encoding of a prompt, in a decoder, against the tokenised pairs."""
    tokenizer = make_tokenizer()
    prompts: list[Any] = [
        "w1 w2 w3",
        [{"role": "user", "content": "w4 w5"}],
        [
            {"role": "system", "content": "w1"},
            {"role": "user", "content": "w2"},
            assistant("w3"),
            {"role": "user", "content": "w4"},
        ],
    ]
    guide = SequenceReward((make_rm(), tokenizer), chat_template=template)
    RewardGuidedDecoder.from_pretrained((make_lm(), tokenizer), reward=guide)
    pairs = [PreferencePair(prompt, "w6 w7", "w8", i) for i, prompt in enumerate(prompts)]
    tokenized, _ = tokenize_pairs(pairs, tokenizer, chat_template=template)
    for pair in tokenized:
        prompt = Prompt(prompts[pair.index])
        assert pair.prompt_ids == guide.encode(prompt)[0]
        assert pair.chosen_ids == [*ids_of(tokenizer, "w6 w7"), 1]
        assert pair.rejected_ids == [*ids_of(tokenizer, "w8"), 1]
        # What the decoder would score for this answer is what was trained on.
        prefix = Prefix(prompt, prompt.ids(tokenizer))
        assert len(guide.score_answer(prefix, pair.chosen_ids)) == 3


@pytest.mark.model
def test_ids_of_a_real_tokenizer_are_those_of_the_whole_chat(smollm2: Path) -> None:
    """Prompt and answer, tokenised apart, are the chat template's own text of the whole conversation."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompt = [USER, assistant("Well — naïve?"), {"role": "user", "content": " And 1,234.5 °C? "}]
    rows = [{"prompt": prompt, "chosen": " It's HOT.\n\nVery. ", "rejected": "你好 🙂"}]
    (pair,), _ = tokenize_pairs(load_pairs(rows)[0], tokenizer)
    for answer, ids in (("It's HOT.\n\nVery.", pair.chosen_ids), ("你好 🙂", pair.rejected_ids)):
        whole = tokenizer.apply_chat_template([*prompt, assistant(answer)], tokenize=False)
        assert tokenizer.decode(pair.prompt_ids + ids) == whole.rstrip("\n")
        assert ids_of(tokenizer, whole.rstrip("\n")) == pair.prompt_ids + ids
    assert pair.chosen_ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_answers_are_trimmed_after_a_chat_template_alone() -> None:
    tokenizer = make_tokenizer(words=[*WORDS, " "])
    tokenizer.backend_tokenizer.pre_tokenizer = None
    rows = [{"prompt": "w1", "chosen": " ", "rejected": "w2"}]
    pairs = [PreferencePair("w1", " w2", "w3", 0)]
    as_text, _ = tokenize_pairs(pairs, tokenizer)
    as_chat, _ = tokenize_pairs(pairs, tokenizer, chat=True)
    assert as_text[0].chosen_ids == [ids_of(tokenizer, " w2")[0], 1] != [ids_of(tokenizer, "w2")[0], 1]
    assert as_chat[0].chosen_ids == [ids_of(tokenizer, "w2")[0], 1]
    assert as_chat[0].prompt_ids == Prompt([{"role": "user", "content": "w1"}]).ids(tokenizer)
    with pytest.raises(RGTGError, match="1 dropped: empty prompt or answer"):
        load_pairs(rows)


def test_long_prompts_lose_their_beginning_or_their_pair() -> None:
    tokenizer = make_tokenizer()
    long = " ".join(f"w{i}" for i in range(20))
    pairs = [
        PreferencePair(long, "w1 w2 w3", "w4", 0),
        PreferencePair("w1", "w2", "w3", 1),
        PreferencePair("w1", long, "w2", 2),
        PreferencePair(long, "w1 w2 w3 w4 w5 w6 w7 w8 w9", "w2", 3),
        PreferencePair("w1", "w2 w3 w4 w5 w6 w7 w8 w9", "w2", 4),
    ]
    kept, report = tokenize_pairs(pairs, tokenizer, max_length=10)
    assert report == DataReport(read=5, kept=3, too_long=2, truncated=1)
    assert [pair.index for pair in kept] == [0, 1, 4]
    # Ten tokens: the prompt's last six, three of the answer, EOS.
    assert kept[0].prompt_ids == ids_of(tokenizer, long)[-6:]
    assert kept[2].prompt_ids == ids_of(tokenizer, "w1")
    assert report.lines()[-1] == "1 kept with the beginning of their prompt cut off"
    kept, report = tokenize_pairs(pairs, tokenizer, max_length=10, truncate_prompt=False)
    assert [pair.index for pair in kept] == [1, 4]
    assert report == DataReport(read=5, kept=2, too_long=3)
    assert all(len(pair.prompt_ids) + len(pair.chosen_ids) <= 10 for pair in kept)


def test_short_empty_and_identical_answers_are_counted() -> None:
    tokenizer = make_tokenizer()
    pairs = [
        PreferencePair("w1", "w2 w3", "w4 w5", 0),
        PreferencePair("w1", "w2 w3", "w4", 1),
        PreferencePair("w1", "w2  w3", "w2 w3", 2),
        PreferencePair("w1", " ", "w2", 3),
    ]
    kept, report = tokenize_pairs(pairs, tokenizer, min_answer_tokens=2)
    assert [pair.index for pair in kept] == [0]
    assert report == DataReport(read=4, kept=1, short=1, identical=1, empty=1)


def test_many_pairs_keep_their_order() -> None:
    tokenizer = make_tokenizer()
    pairs = [PreferencePair(f"w{i % 50}", f"w{i % 49}", "w50", i) for i in range(600)]
    kept, _ = tokenize_pairs(pairs, tokenizer)
    assert [pair.index for pair in kept] == list(range(600))
    assert all(pair.chosen_ids[0] == ids_of(tokenizer, f"w{pair.index % 49}")[0] for pair in kept)


def test_tokenizers_that_cannot_serve_are_named() -> None:
    pairs = load_pairs(ROWS)[0]
    tokenizer = make_tokenizer()
    with pytest.raises(RGTGError, match="max_length=1 is below 2"):
        tokenize_pairs(pairs, tokenizer, max_length=1)
    with pytest.raises(RGTGError, match=r"no pairs are left of the 2 in the pairs .*: 2 dropped: too long"):
        tokenize_pairs(pairs, tokenizer, max_length=3)
    chats = load_pairs([{"prompt": [USER], "chosen": "w1", "rejected": "w2"}])[0]
    with pytest.raises(RGTGError, match=r"the pairs are chats and the tokenizer of .* has no chat template"):
        tokenize_pairs(chats, make_tokenizer(chat_template=None))
    assert tokenize_pairs(pairs, make_tokenizer(chat_template=None), chat=True)[0]
    tokenizer.eos_token = None
    with pytest.raises(RGTGError, match="has no EOS token"):
        tokenize_pairs(pairs, tokenizer)
    assert tokenize_pairs(pairs, tokenizer, eos_token_id=5)[0][0].chosen_ids[-1] == 5
