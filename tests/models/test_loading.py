"""Models that cannot be served are refused with their name, the reason and the way out in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf

from rgtg_fast import Guidance, RewardGuidedDecoder, RGTGError, SequenceReward
from rgtg_fast.models.loading import language_runner, refusal, resolve_device, resolve_dtype, reward_runner
from rgtg_fast.models.support import exceeded_window
from rgtg_fast.models.verification import probe
from tests.conftest import make_lm, make_rm, make_tokenizer, tiny_config
from tests.models.tiny_families import tiny_model

BASE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def one_line(error: pytest.ExceptionInfo[RGTGError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def refused(lm: object, **settings: object) -> str:
    with pytest.raises(RGTGError) as error:
        RewardGuidedDecoder.from_pretrained((lm, None), **settings)
    return one_line(error)


def test_windows_that_the_attention_is_not_told_are_refused_unless_rows_stay_inside() -> None:
    """Its masks have the window, its modules pass none."""
    settings = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}
    config = tf.Qwen2MoeConfig(
        **BASE,
        **settings,
        num_key_value_heads=1,
        max_position_embeddings=64,
        num_experts=2,
        num_experts_per_tok=1,
    )
    model = tf.AutoModelForCausalLM.from_config(config)
    message = refused(model)
    assert "Qwen2MoeForCausalLM" in message
    assert "sliding window of 8 tokens" in message
    assert "max_length=8 works" in message
    assert RewardGuidedDecoder.from_pretrained((model, None), max_length=8).max_length == 8


def test_chunks_are_refused_by_name() -> None:
    config = tf.Llama4TextConfig(
        **BASE, intermediate_size_mlp=16, num_key_value_heads=1, head_dim=8, num_local_experts=2
    )
    config.attention_chunk_size, config.max_position_embeddings = 8, 64
    message = str(refusal(tf.AutoModelForCausalLM.from_config(config), None))
    assert "attends in chunks of 8 tokens" in message
    assert "chunks" not in str(refusal(tf.AutoModelForCausalLM.from_config(config), 8))


@pytest.mark.parametrize("length", [2, 4])
def test_a_window_shorter_than_the_check_at_load_time(length: int) -> None:
    config = tf.MistralConfig(**BASE, num_key_value_heads=1, sliding_window=4, max_position_embeddings=64)
    model = tf.AutoModelForCausalLM.from_config(config)
    assert RewardGuidedDecoder.from_pretrained((model, None), max_length=length).max_length == length


@pytest.mark.parametrize("pad", [3, 17, 38, 40])
def test_any_padding_token_is_accepted(pad: int) -> None:
    rm = make_rm(pad_token_id=pad)
    decoder = RewardGuidedDecoder.from_pretrained((make_lm(), None), reward=SequenceReward((rm, None)))
    assert decoder.generate([[5, 6]], 2)[0].rewards


def test_a_window_that_no_layer_uses_is_none() -> None:
    config = tf.Qwen2Config(**BASE, num_key_value_heads=1, use_sliding_window=False, sliding_window=4)
    model = tf.AutoModelForCausalLM.from_config(config)
    assert exceeded_window(model.config, None) is None
    assert not language_runner(model, "auto", None).windows


def test_linear_attention_hybrids_are_refused_by_name() -> None:
    for config in (tf.Qwen3NextConfig, tf.Qwen3_5TextConfig):
        model = tiny_model("lm", config.__name__)
        message = refused(model)
        assert type(model).__name__ in message
        assert "recurrent state" in message


def test_recurrent_state_is_refused() -> None:
    config = tf.MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=1)
    message = refused(tf.AutoModelForCausalLM.from_config(config))
    assert "MambaForCausalLM" in message
    assert "recurrent state" in message


def test_encoder_decoders_are_refused() -> None:
    config = tf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    assert "encoder-decoder" in refused(tf.T5ForConditionalGeneration(config))


def test_native_engine_says_why_it_cannot_serve() -> None:
    config = tf.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)
    message = refused(tf.AutoModelForCausalLM.from_config(config), engine="native")
    assert "engine='native' cannot run GPT2LMHeadModel" in message
    assert "engine='auto'" in message
    assert "unknown" in refused(make_lm(), engine="warp")


def test_a_reward_model_with_several_labels() -> None:
    with pytest.raises(RGTGError) as error:
        RewardGuidedDecoder.from_pretrained(
            (make_lm(), None), reward=SequenceReward((make_rm(num_labels=3), None))
        )
    assert "has 3 labels" in one_line(error)


def test_a_reward_folder_without_a_trained_head(tmp_path: Path) -> None:
    make_lm().save_pretrained(tmp_path / "lm")
    make_tokenizer().save_pretrained(tmp_path / "lm")
    with pytest.raises(RGTGError) as error:
        RewardGuidedDecoder.from_pretrained(tmp_path / "lm", reward=_one_label_copy(tmp_path))
    assert "no trained reward head" in one_line(error)


def _one_label_copy(tmp_path: Path) -> Path:
    model = make_lm()
    model.config.num_labels = 1
    model.save_pretrained(tmp_path / "headless")
    make_tokenizer().save_pretrained(tmp_path / "headless")
    return tmp_path / "headless"


def test_tokenizers_that_differ() -> None:

    words = list(make_tokenizer().get_vocab())
    other = make_tokenizer(
        words=[*sorted(words, key=make_tokenizer().get_vocab().get)[:10], "zz", *map(str, range(53))]
    )
    with pytest.raises(RGTGError) as error:
        RewardGuidedDecoder.from_pretrained(
            (make_lm(), make_tokenizer()), reward=SequenceReward((make_rm(), other))
        )
    message = one_line(error)
    assert "token 10 is 'w4'" in message
    assert "TextReward" in message


def test_a_reward_model_with_fewer_embeddings() -> None:

    with pytest.raises(RGTGError, match="has embeddings for 32 tokens and the base model uses 64"):
        RewardGuidedDecoder.from_pretrained(
            (make_lm(), None), reward=SequenceReward((make_rm(vocab_size=32), None))
        )


def test_rows_of_a_padded_vocabulary_are_never_candidates() -> None:

    tokenizer = make_tokenizer()
    lm, rm = make_lm(vocab_size=80), make_rm(vocab_size=64)
    decoder = RewardGuidedDecoder.from_pretrained((lm, tokenizer), reward=SequenceReward((rm, tokenizer)))
    assert decoder.lm.vocabulary == 64
    row = decoder.generate("w1 w2", max_new_tokens=3, guidance=Guidance(k=64), trace=True)[0]
    assert {c.token for c in row.trace[0].candidates} == set(range(64))


@pytest.mark.parametrize("name", ["/no/such/folder", "no-such-model", "no/such"])
def test_missing_models_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(RGTGError) as error:
        RewardGuidedDecoder.from_pretrained(name)
    assert name in one_line(error)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(RGTGError) as error:
        RewardGuidedDecoder.from_pretrained(tmp_path)
    assert "not a folder that transformers can load" in one_line(error)


def test_devices_and_dtypes() -> None:
    assert resolve_dtype(None, torch.device("cpu")) == torch.float32
    assert resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    with pytest.raises(RGTGError, match="dtype='int8' is unknown"):
        resolve_dtype("int8", torch.device("cpu"))
    with pytest.raises(RGTGError, match="device='warp'"):
        resolve_device("warp")
    if not torch.cuda.is_available():
        with pytest.raises(RGTGError, match="no CUDA device"):
            resolve_device("cuda")


def test_the_default_length_is_the_models_context() -> None:
    decoder = RewardGuidedDecoder.from_pretrained((make_lm(max_position_embeddings=48), None))
    assert decoder.max_length == 48
    assert tiny_config().max_position_embeddings == 128


@pytest.mark.parametrize("size", [1, 10])
def test_a_reward_near_zero_is_no_reason_to_refuse(size: int) -> None:
    """The rounding of bfloat16 is no reason to refuse, even where the probe's reward is close to 0."""
    model = make_rm(dtype=torch.bfloat16)
    ids = probe(reward_runner(model, "transformers", None))
    with torch.inference_mode():
        state = model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1].float()
        weight = size * model.score.weight.float()
        weight -= torch.outer(weight @ state, state) / state.square().sum()
        model.score.weight.copy_(weight)
    reward_runner(model, "transformers", None)
    reward_runner(model, "auto", None)


def test_a_reward_model_that_scales_its_scores_is_refused() -> None:
    model = make_rm()
    forward = model.forward

    def scaled(*args: object, **kwargs: object) -> object:
        found = forward(*args, **kwargs)
        found.logits = found.logits * 1.5
        return found

    model.forward = scaled
    with pytest.raises(RGTGError, match="cannot be served"):
        reward_runner(model, "auto", None)


def test_a_family_that_scales_its_logits_is_refused() -> None:
    config = tf.GraniteConfig(**BASE, num_key_value_heads=1, logits_scaling=4.0)
    message = refused(tf.AutoModelForCausalLM.from_config(config))
    assert "GraniteForCausalLM cannot be served" in message
    assert "75" in message or "300" in message


def test_a_loaded_pair_keeps_its_dtype_by_default() -> None:
    lm, rm = make_lm(dtype=torch.bfloat16), make_rm(dtype=torch.float64)
    decoder = RewardGuidedDecoder.from_pretrained((lm, None), reward=SequenceReward((rm, None)))
    assert lm.dtype == decoder.lm.runner.cache.dtype == torch.bfloat16
    assert rm.dtype == decoder.reward.runner.cache.dtype == torch.float64
    assert decoder.generate([[5, 6]], 3)[0].rewards
    RewardGuidedDecoder.from_pretrained((lm, None), reward=SequenceReward((rm, None)), dtype="float32")
    assert lm.dtype == rm.dtype == torch.float32
