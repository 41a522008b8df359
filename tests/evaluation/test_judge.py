"""Judges rate answers as the model itself would, and a judge that is a guide is found out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rgtg_fast import RewardGuidedDecoder, RGTGError
from rgtg_fast.evaluation import judge as judging
from rgtg_fast.evaluation.judge import Judge, Rating, conflicts, folders_of
from rgtg_fast.models.loading import load_causal_lm
from tests.conftest import make_rm, make_tokenizer
from tests.evaluation.studies import models, saved

CHATS = [[{"role": "user", "content": text}] for text in ("w1 w2", "w3", "w1 w2", "w1 w2", "w4 w5 w6")]
ANSWERS = ["w7 w8", "w9 w10 w11", "w12", "", " w13 w14 "]


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return models(tmp_path_factory.mktemp("models"))


def rated(judge: Judge) -> list[Rating]:
    found = dict(judge.rate(CHATS, ANSWERS))
    assert sorted(found) == list(range(len(ANSWERS)))
    return [found[i] for i in range(len(ANSWERS))]


@torch.inference_mode()
def naive(folder: str, end: bool) -> list[float]:
    """One forward a text, the score of its last token."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), make_tokenizer()
    found = []
    for chat, answer in zip(CHATS, ANSWERS, strict=True):
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text)["input_ids"] + tokenizer(answer.strip())["input_ids"]
        if end or not answer.strip():
            ids.append(tokenizer.eos_token_id)
        found.append(float(model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1])))
    return found


@pytest.mark.parametrize("budget", [1, 2048])
def test_ratings_are_those_of_the_model(named: dict[str, str], budget: int) -> None:
    found = rated(Judge(named["judge"], load_causal_lm(named["lm"], None, None), budget))
    assert [one.ended for one in found] == pytest.approx(naive(named["judge"], True), abs=1e-5)
    assert [one.unended for one in found] == pytest.approx(naive(named["judge"], False), abs=1e-5)
    assert found[3].ended == found[3].unended


def test_a_rating_does_not_depend_on_what_else_is_rated(named: dict[str, str]) -> None:
    """To the last digit, so that a study that was interrupted gives the numbers of one that was not."""
    judge = Judge(named["judge"], load_causal_lm(named["lm"], None, None))
    together = rated(judge)
    alone = [next(judge.rate([chat], [answer]))[1] for chat, answer in zip(CHATS, ANSWERS, strict=True)]
    assert alone == together
    assert dict(judge.rate(CHATS[::-1], ANSWERS[::-1])) == dict(enumerate(together[::-1]))


def test_an_end_token_in_an_answer_is_not_doubled(named: dict[str, str]) -> None:
    judge = Judge(named["judge"], load_causal_lm(named["lm"], None, None))
    marked = ["w7 w8 <eos>", "w7 w8</s>", "w7 w8<|im_end|>\n", "w7 w8"]
    assert len({rating for _, rating in judge.rate(CHATS[:1] * 4, marked)}) == 1


def test_a_guide_of_any_kind_may_judge(named: dict[str, str]) -> None:
    base = load_causal_lm(named["lm"], None, None)
    found = rated(Judge(f"rad:{named['judge']}", base))
    for end, rewards in ((True, [one.ended for one in found]), (False, [one.unended for one in found])):
        clamped = [min(max(reward, 0), 1) for reward in naive(named["judge"], end)]
        assert rewards == pytest.approx(clamped, abs=1e-5)
    likely = rated(Judge(f"genarm:{named['policy']}", base))
    decoder = RewardGuidedDecoder.from_pretrained(base, f"genarm:{named['policy']}")
    (tokens,) = decoder.score([CHATS[0]], [[*decoder.tokenizer("w7 w8")["input_ids"], 1]])
    assert likely[0].ended == pytest.approx(sum(tokens), abs=1e-5)
    assert likely[0].unended == pytest.approx(sum(tokens[:-1]), abs=1e-5)


def test_a_judge_without_a_chat_template_reads_the_base_models(named: dict[str, str], tmp_path: Path) -> None:
    base = load_causal_lm(named["lm"], None, None)
    folder = tmp_path / "plain"
    make_rm(seed=2).save_pretrained(folder)
    make_tokenizer(chat_template=None).save_pretrained(folder)
    assert rated(Judge(str(folder), base)) == rated(Judge(named["judge"], base))


def test_a_judge_reads_whole_chats_of_its_own_template(named: dict[str, str], tmp_path: Path) -> None:
    """Where a template puts something else before an answer than after a prompt, as an empty think block."""
    folder = tmp_path / "judge"
    model = AutoModelForSequenceClassification.from_pretrained(named["judge"]).eval()
    tokenizer = make_tokenizer()
    header = "<{{ message.role }}> "
    assert header in str(tokenizer.chat_template)
    thinks = header + "{% if message.role == 'assistant' %}w50 w51 {% endif %}"
    tokenizer.chat_template = str(tokenizer.chat_template).replace(header, thinks)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ((_, found),) = Judge(str(folder), load_causal_lm(named["lm"], None, None)).rate(CHATS[:1], ["w7 w8"])
    chat = [*CHATS[0], {"role": "assistant", "content": "w7 w8"}]
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"]
    assert tokenizer.decode(ids) == "<user> w1 w2 <assistant> w50 w51 w7 w8"
    with torch.inference_mode():
        expected = model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1])
    assert found.unended == pytest.approx(float(expected), abs=1e-5)


def test_no_model_and_no_number(named: dict[str, str], tmp_path: Path) -> None:
    base = load_causal_lm(named["lm"], None, None)
    with pytest.raises(RGTGError, match="does not exist"):
        Judge(str(tmp_path / "a" / "b"), base)
    broken = make_rm()
    with torch.no_grad():
        broken.score.weight.fill_(float("nan"))
    with pytest.raises(RGTGError, match=r"rates answer \d with NaN"):
        rated(Judge(saved(broken, tmp_path / "broken"), base))


def test_an_answer_over_the_context_is_refused(named: dict[str, str]) -> None:
    judge = Judge(named["judge"], load_causal_lm(named["lm"], None, None))
    with pytest.raises(RGTGError, match="whose context holds 128"):
        list(judge.rate(CHATS[:1], ["w1 " * 130]))
    # A long prompt loses its beginning instead.
    long = [{"role": "user", "content": "w1 " * 300}]
    assert len(list(judge.rate([long], ["w2 w3"]))) == 1


def test_names_and_the_folders_in_them() -> None:
    assert folders_of("some/path") == ["some/path"]
    assert folders_of("eft:a,b") == ["a", "b"]
    assert folders_of("contrastive") == []
    assert folders_of("mixture:0.5*pargs:a+2*contrastive") == ["a"]
    assert folders_of("farma:org/name-2+x") == ["org/name-2+x"]
    (bundled,) = folders_of("bundled:args")
    assert Path(bundled).is_dir()
    assert folders_of("args:bundled:args") == [bundled]


def test_a_judge_that_guides_is_found_by_its_weights(named: dict[str, str], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(named["guide"], copy)
    for judge in (named["guide"], str(copy), f"rad:{named['guide']}"):
        (line,) = conflicts({"j": judge}, [named["guide"]])
        assert line.startswith(f"the judge j is the reward model {named['guide']}")
    assert conflicts({"j": named["judge"]}, [named["guide"], "contrastive"]) == []
    assert conflicts({"j": "org/model"}, ["org/model"]) != []


def test_a_judge_that_has_seen_the_guides_data_is_found(named: dict[str, str], tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder, source, data in zip(folders, ("judge", "guide"), ("abc", "abc"), strict=True):
        shutil.copytree(named[source], folder)
        (folder / "rgtg_fast.json").write_text(json.dumps({"data_sha256": data}))
    (line,) = conflicts({"j": str(folders[0])}, [str(folders[1])])
    assert "trained on the same data" in line


def test_the_fingerprint_follows_the_weights(named: dict[str, str], tmp_path: Path) -> None:
    first = judging.weights_digest(named["guide"])
    assert first == judging.weights_digest(named["guide"])
    assert first != judging.weights_digest(named["judge"])
    assert judging.weights_digest(tmp_path) is None
    assert judging.weights_digest("org/model") is None
