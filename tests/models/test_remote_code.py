"""Code that comes with a model runs only where the user trusts the model by name, and then the model is verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rgtg_fast import (
    AutoregressiveReward,
    Guidance,
    LogRatioReward,
    MixtureReward,
    RewardGuidedDecoder,
    RGTGError,
    SequenceReward,
    TextReward,
    VocabularyReward,
    named_guide,
)
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.models import code_models
from tests.models.adapters import write_adapter
from tests.rewards import naive

PROMPTS = [[7, 8, 9, 10, 11], [12, 13], [20, 21, 22]]
GREEDY = Guidance(k=1, beta=0.0, temperature=0.0)


@pytest.fixture
def ran(own_folders: Path) -> Path:
    """A file that the code of these models creates when it runs."""
    return own_folders / "ran"


@pytest.fixture
def pair() -> Any:
    return make_lm(), make_tokenizer()


def test_a_trusted_language_model_is_served_exactly(ran: Path, tmp_path: Path) -> None:
    folder = code_models.save(tmp_path / "lm", ran)
    with pytest.raises(RGTGError, match=r"runs only with trust_remote_code=True \(--trust-remote-code\)"):
        RewardGuidedDecoder.from_pretrained(str(folder), device="cpu")
    assert not ran.exists()
    decoder = RewardGuidedDecoder.from_pretrained(str(folder), device="cpu", trust_remote_code=True)
    assert ran.exists()
    model: Any = decoder.lm.runner.model
    assert type(model).__name__ == "OwnForCausalLM"
    plain: Any = make_lm()
    for row, prompt in zip(decoder.generate(PROMPTS, 4, GREEDY), PROMPTS, strict=True):
        for i, token in enumerate(row.tokens):
            assert token == int(naive.logits_after(plain, [*prompt, *row.tokens[:i]]).argmax())


def test_what_trusted_code_prints_is_no_output_of_a_command(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--json` promises that stdout holds nothing else."""
    folder = code_models.save(tmp_path / "lm", ran)
    for file in folder.glob("*.py"):
        file.write_text(f"{file.read_text()}\nprint({file.name!r})\n")
    RewardGuidedDecoder.from_pretrained(str(folder), device="cpu", trust_remote_code=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert all(file.name in err for file in folder.glob("*.py"))


def test_trusted_code_is_verified_like_any_other(ran: Path, tmp_path: Path) -> None:
    folder = code_models.save(tmp_path / "lm", ran, scale=0.5)
    with pytest.raises(RGTGError, match="cannot be served: its logits differ from its head's output"):
        RewardGuidedDecoder.from_pretrained(str(folder), device="cpu", trust_remote_code=True)


def test_a_trusted_reward_model(ran: Path, tmp_path: Path, pair: Any) -> None:
    folder = str(code_models.save(tmp_path / "rm", ran, head=True))
    own = RewardGuidedDecoder.from_pretrained(pair, reward=(make_rm(), make_tokenizer()))
    wanted = own.score([PROMPTS[0]], [[9, 10]])[0]
    for reward in (SequenceReward(folder), TextReward(folder), folder, f"text:{folder}", f"rad:{folder}"):
        with pytest.raises(RGTGError, match="runs only with trust_remote_code=True"):
            RewardGuidedDecoder.from_pretrained(pair, reward=reward)
    # Trusting what the call names does not trust an object.
    with pytest.raises(RGTGError, match="runs only with trust_remote_code=True"):
        RewardGuidedDecoder.from_pretrained(pair, reward=SequenceReward(folder), trust_remote_code=True)
    assert not ran.exists()
    named = RewardGuidedDecoder.from_pretrained(pair, reward=folder, trust_remote_code=True)
    given = RewardGuidedDecoder.from_pretrained(pair, reward=SequenceReward(folder, trust_remote_code=True))
    path = RewardGuidedDecoder.from_pretrained(pair, reward=Path(folder), trust_remote_code=True)
    for decoder in (named, given, path):
        torch.testing.assert_close(decoder.score([PROMPTS[0]], [[9, 10]])[0], wanted)
    RewardGuidedDecoder.from_pretrained(pair, reward=TextReward(folder, trust_remote_code=True))


def test_every_named_reward_passes_it_on(ran: Path, tmp_path: Path, pair: Any) -> None:
    lm, rm = code_models.save(tmp_path / "lm", ran), code_models.save(tmp_path / "rm", ran, head=True)
    names = [
        f"farma:{lm}",
        f"genarm:{lm}",
        f"eft:{lm},{lm}",
        f"text:{rm}",
        f"rad-inverse:{rm}",
        f"mixture:0.5*pargs:{rm}+0.5*genarm:{lm}",
    ]
    for name in names:
        with pytest.raises(RGTGError, match="runs only with trust_remote_code=True"):
            RewardGuidedDecoder.from_pretrained(pair, reward=name)
        RewardGuidedDecoder.from_pretrained(pair, reward=name, trust_remote_code=True)
    makers: list[Callable[..., Any]] = [VocabularyReward, AutoregressiveReward]
    for make in makers:
        RewardGuidedDecoder.from_pretrained(pair, reward=make(str(lm), trust_remote_code=True))
    RewardGuidedDecoder.from_pretrained(pair, reward=LogRatioReward(lm, lm, trust_remote_code=True))
    mixture = named_guide(names[-1], trust_remote_code=True)
    assert isinstance(mixture, MixtureReward)


def test_an_adapters_base_is_not_trusted(ran: Path, tmp_path: Path, pair: Any) -> None:
    base = code_models.save(tmp_path / "base", ran)
    folder = write_adapter(tmp_path / "adapter", make_lm(seed=5), base_model_name_or_path=str(base))  # pyright: ignore[reportArgumentType]
    policy = write_adapter(
        tmp_path / "policy",
        make_lm(seed=5),  # pyright: ignore[reportArgumentType]
        head=None,
        task_type="CAUSAL_LM",
        modules_to_save=None,
        base_model_name_or_path=str(base),
    )
    for way in (
        lambda: RewardGuidedDecoder.from_pretrained(pair, reward=str(folder), trust_remote_code=True),
        lambda: RewardGuidedDecoder.from_pretrained(str(policy), device="cpu", trust_remote_code=True),
    ):
        with pytest.raises(RGTGError, match="needs code of its own"):
            way()
    assert not ran.exists()


def test_code_of_another_repository_is_not_trusted(ran: Path, tmp_path: Path) -> None:
    folder = code_models.save(tmp_path / "lm", ran, repository="someone/else")
    with pytest.raises(RGTGError, match="runs code of another repository, 'someone/else'"):
        RewardGuidedDecoder.from_pretrained(str(folder), device="cpu", trust_remote_code=True)
    folder = code_models.save(tmp_path / "tokenizer", ran)
    file = folder / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["someone/else--tokenization_own.T", None]}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    with pytest.raises(RGTGError, match="runs code of another repository, 'someone/else'"):
        RewardGuidedDecoder.from_pretrained(str(folder), device="cpu", trust_remote_code=True)
    assert not ran.exists()


def test_code_that_fails_is_one_line(ran: Path, tmp_path: Path) -> None:
    folder = code_models.save(tmp_path / "lm", ran)
    file = folder / "modeling_own.py"
    for code in ("import a_package_that_nobody_has\n", "raise ZeroDivisionError('a\\nb')\n", "def (\n"):
        file.write_text(code)
        with pytest.raises(RGTGError) as error:
            RewardGuidedDecoder.from_pretrained(str(folder), device="cpu", trust_remote_code=True)
        assert "\n" not in str(error.value)
        assert str(folder) in str(error.value)
