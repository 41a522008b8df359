"""A reward folded into the base model's head: the checkpoint's logits and tokens, and what is refused."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import AutoModelForCausalLM, AutoTokenizer

from rgtg_fast import (
    AutoregressiveReward,
    Guidance,
    LogRatioReward,
    MixtureReward,
    RewardGuidedDecoder,
    RGTGError,
    SequenceReward,
    VocabularyReward,
)
from rgtg_fast.cli.main import main
from rgtg_fast.integrations.fold import export_folded
from tests.conftest import CHAT_TEMPLATE, make_lm, make_tokenizer
from tests.models.adapters import write_adapter

PROMPTS = [[7, 12, 30, 9], [41, 8], [10, 11, 12, 13, 14, 15, 16]]
LAYERS = 2


def head_only(folder: Path, base: Any, seed: int = 1, head: int | None = 64) -> str:
    """A reward whose head alone was trained."""
    return str(write_adapter(folder, base, fork=LAYERS, seed=seed, head=head))


def with_head(base: Any, seed: int, **settings: Any) -> Any:
    """A copy of a base model with another head, not tied."""
    config = copy.deepcopy(base.config)
    config.tie_word_embeddings = False
    for name, value in settings.items():
        setattr(config, name, value)
    own = AutoModelForCausalLM.from_config(config).eval()
    own.base_model.load_state_dict(base.base_model.state_dict())
    torch.manual_seed(seed)
    torch.nn.init.normal_(own.get_output_embeddings().weight, std=0.2)
    return own


def logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def check(folder: Path, lm: Any, tokenizer: Any, reward: Any, beta: float) -> Any:
    """The folder's greedy tokens are the decoder's."""
    folded = AutoModelForCausalLM.from_pretrained(folder)
    decoder = RewardGuidedDecoder.from_pretrained((copy.deepcopy(lm), tokenizer), reward)
    rows = decoder.generate(PROMPTS, 8, Guidance(beta=beta, support="all", temperature=0))
    ends = decoder.lm.eos_ids
    for prompt, row in zip(PROMPTS, rows, strict=True):
        own = folded.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        assert [token for token in own if token not in ends] == row.tokens
    return folded


@pytest.mark.parametrize("tied", [False, True])
def test_the_folded_head_is_the_sum(tmp_path: Path, tied: bool) -> None:
    lm, tokenizer = make_lm(tie_word_embeddings=tied), make_tokenizer()
    lm.generation_config.eos_token_id = [1, 3]
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    path = head_only(tmp_path / "reward", lm)
    output = export_folded((lm, tokenizer), f"farma:{path}", 1.5, tmp_path / "folded")
    folded = check(output, lm, tokenizer, VocabularyReward(path), 1.5)
    assert output == tmp_path / "folded"
    assert folded.config.tie_word_embeddings is False
    assert folded.generation_config.eos_token_id == [1, 3]
    assert AutoTokenizer.from_pretrained(output).chat_template == tokenizer.chat_template
    head = (
        RewardGuidedDecoder.from_pretrained((lm, tokenizer), VocabularyReward(path))
        .reward._scorers[0]
        .runtime.head
    )
    for prompt in PROMPTS:
        with torch.no_grad():
            ids = torch.tensor([prompt])
            states = lm.model(ids).last_hidden_state
            expected = lm(ids).logits + 1.5 * head(states)
            assert (folded(ids).logits - expected).abs().max() < 1e-5
    assert lm.config.tie_word_embeddings is tied
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.state_dict().items())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_log_probabilities_fold_up_to_a_constant_per_row(tmp_path: Path) -> None:
    lm, tokenizer = make_lm(), make_tokenizer()
    one, two = (head_only(tmp_path / name, lm, seed) for seed, name in enumerate(("one", "two")))
    rewards = {
        "genarm": lambda: AutoregressiveReward(one),
        "eft": lambda: LogRatioReward(one, two),
        "mixture": lambda: MixtureReward([VocabularyReward(one), AutoregressiveReward(two)], [0.5, -0.25]),
    }
    for name, make in rewards.items():
        output = export_folded((lm, tokenizer), make(), 0.7, tmp_path / name)
        folded = check(output, lm, tokenizer, make(), 0.7)
        decoder = RewardGuidedDecoder.from_pretrained((copy.deepcopy(lm), tokenizer), make())
        for prompt in PROMPTS:
            tokens = [[token] for token in range(64)]
            rewarded = torch.tensor([row[0] for row in decoder.score([prompt] * 64, tokens)])
            expected = (logprobs(lm, prompt) + 0.7 * rewarded).log_softmax(-1)
            assert (logprobs(folded, prompt) - expected).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:the chat template of the reward model")
def test_a_whole_model_whose_trunk_is_the_base(tmp_path: Path) -> None:
    lm, tokenizer = make_lm(tie_word_embeddings=True), make_tokenizer()
    own = with_head(lm, 5)
    output = export_folded((lm, tokenizer), VocabularyReward((own, tokenizer)), 2.0, tmp_path / "folded")
    check(output, lm, tokenizer, VocabularyReward((own, tokenizer)), 2.0)
    own.model.layers[1].mlp.up_proj.weight.data[3, 4] += 0.01
    with pytest.raises(RGTGError, match=r"has other weights \(layers.1.mlp.up_proj.weight\)"):
        export_folded((lm, tokenizer), VocabularyReward((own, tokenizer)), 2.0, tmp_path / "other")
    shifted = with_head(lm, 5, rms_norm_eps=0.1)
    with pytest.raises(RGTGError, match=r"another architecture \(rms_norm_eps\)"):
        export_folded((lm, tokenizer), VocabularyReward((shifted, tokenizer)), 2.0, tmp_path / "other")
    template = VocabularyReward(
        (with_head(lm, 5), tokenizer), chat_template=CHAT_TEMPLATE.replace("<{{", "{{")
    )
    with pytest.raises(RGTGError, match="another chat template"):
        export_folded((lm, tokenizer), template, 2.0, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_heads_with_a_bias(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tf.PhiConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        eos_token_id=1, pad_token_id=0, max_position_embeddings=64, initializer_range=0.4,
    )  # fmt: skip
    lm, tokenizer = AutoModelForCausalLM.from_config(config).eval(), make_tokenizer()
    own = with_head(lm, 3)
    torch.nn.init.normal_(own.lm_head.bias)
    output = export_folded((lm, tokenizer), VocabularyReward((own, tokenizer)), 1.25, tmp_path / "folded")
    folded = check(output, lm, tokenizer, VocabularyReward((own, tokenizer)), 1.25)
    assert torch.allclose(folded.lm_head.bias, lm.lm_head.bias + 1.25 * own.lm_head.bias, atol=1e-6)
    llama = make_lm()
    biased = with_head(llama, 3)
    biased.lm_head.bias = torch.nn.Parameter(torch.randn(64))
    with pytest.raises(RGTGError, match="LlamaForCausalLM has no place for one"):
        export_folded((llama, tokenizer), VocabularyReward((biased, tokenizer)), 1.0, tmp_path / "other")


def test_what_is_not_linear_is_refused_by_name(tmp_path: Path) -> None:
    lm, tokenizer = make_lm(), make_tokenizer()
    output = tmp_path / "folded"
    pair = (lm, tokenizer)
    deeper = write_adapter(tmp_path / "deeper", lm, fork=1, head=64)
    with pytest.raises(RGTGError, match=r"deeper cannot be folded .* changes layers below the head"):
        export_folded(pair, VocabularyReward(deeper), 1.0, output)
    scalar = write_adapter(tmp_path / "scalar", lm, fork=2, head=1)
    with pytest.raises(RGTGError, match="a SequenceReward is not linear"):
        export_folded(pair, SequenceReward(scalar), 1.0, output)
    with pytest.raises(RGTGError, match="a ContrastiveReward is not linear"):
        export_folded(pair, "contrastive", 1.0, output)
    with pytest.raises(RGTGError, match="there is no reward"):
        export_folded(pair, None, 1.0, output)
    path = head_only(tmp_path / "reward", lm)
    with pytest.raises(RGTGError, match="beta"):
        export_folded(pair, VocabularyReward(path), float("nan"), output)
    broken = with_head(lm, 1)
    broken.lm_head.weight.data[5, 3] = torch.nan
    with pytest.raises(RGTGError, match="NaN or infinite"):
        export_folded(pair, VocabularyReward((broken, tokenizer)), 1.0, output)
    with pytest.raises(RGTGError, match=r"beyond the range of torch.float16"):
        export_folded(pair, VocabularyReward(path), 1e6, output, dtype="float16")
    torch.manual_seed(0)
    config = tf.Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, eos_token_id=1, pad_token_id=0, max_position_embeddings=64, query_pre_attn_scalar=8,
        attn_logit_softcapping=None, final_logit_softcapping=30.0, sliding_window=64,
    )  # fmt: skip
    capped = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(RGTGError, match=r"caps its logits \(30"):
        export_folded((capped, None), VocabularyReward((with_head(capped, 1), None)), 1.0, output)
    assert not output.exists()


def test_the_folder_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, tokenizer = make_lm(), make_tokenizer()
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    reward = "farma:" + head_only(tmp_path / "reward", lm)
    output = tmp_path / "folded"
    for path in (tmp_path / "lm", tmp_path / "reward"):
        with pytest.raises(RGTGError, match="exists: name another folder"):
            export_folded(tmp_path / "lm", reward, 1.0, path)
    with pytest.raises(RGTGError, match="holds the model that is read"):
        export_folded(tmp_path / "lm", reward, 1.0, tmp_path / "lm", overwrite=True)
    inside = "farma:" + head_only(tmp_path / "lm" / "reward", lm)
    with pytest.raises(RGTGError, match="holds the model that is read"):
        export_folded((lm, tokenizer), inside, 1.0, tmp_path / "lm", overwrite=True)
    shutil.rmtree(tmp_path / "lm" / "reward")
    (tmp_path / "link").symlink_to(tmp_path / "lm")
    with pytest.raises(RGTGError, match="symbolic link"):
        export_folded(tmp_path / "lm", reward, 1.0, tmp_path / "link", overwrite=True)
    (tmp_path / "link").unlink()
    with pytest.raises(RGTGError, match="holds no checkpoint"):
        export_folded(tmp_path / "lm", reward, 1.0, tmp_path / "reward", overwrite=True)
    with pytest.raises(RGTGError, match="cannot write"):
        export_folded(tmp_path / "lm", reward, 1.0, tmp_path / "missing" / "folded")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "save_pretrained", full)
        with pytest.raises(RGTGError, match="No space left"):
            export_folded(tmp_path / "lm", reward, 1.0, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lm", "reward"]
    export_folded(tmp_path / "lm", reward, 1.0, output)
    first = AutoModelForCausalLM.from_pretrained(output).lm_head.weight
    export_folded(tmp_path / "lm", reward, 2.0, output, dtype="bfloat16", overwrite=True)
    second = AutoModelForCausalLM.from_pretrained(output).lm_head.weight
    assert (first.dtype, second.dtype) == (torch.float32, torch.bfloat16)
    exact = lm.lm_head.weight + 2 * (first - lm.lm_head.weight)
    assert (second - exact).abs().max() < 0.02


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm, tokenizer = make_lm(), make_tokenizer()
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    reward, output = "farma:" + head_only(tmp_path / "reward", lm), tmp_path / "folded"

    def export(*options: str) -> tuple[str, str]:
        capsys.readouterr()
        command = ["--fold", "--lm", str(tmp_path / "lm"), "--reward", reward, "--output", str(output)]
        with pytest.raises(SystemExit) as end:
            main(["export", *command, *options])
        printed = capsys.readouterr()
        assert bool(end.value.code) is not bool(printed.out)
        return printed.out, printed.err

    assert export("--beta", "1.5")[0] == f"{output}\n"
    check(output, lm, tokenizer, VocabularyReward(reward.removeprefix("farma:")), 1.5)
    assert "exists: name another folder" in export("--beta", "0.5")[1]
    assert export("--beta", "0.5", "--overwrite")[0] == f"{output}\n"
    check(output, lm, tokenizer, VocabularyReward(reward.removeprefix("farma:")), 0.5)
    assert "--temperature has no part in it" in export("--temperature", "0.5")[1]
