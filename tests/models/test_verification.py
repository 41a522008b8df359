"""Models whose forward differs from the cached one are refused in every dtype, with their name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as tf

from rgtg_fast import Guidance, RewardGuidedDecoder, RGTGError, SequenceReward
from rgtg_fast.models import verification
from rgtg_fast.models.attention import NAME
from rgtg_fast.models.kv_cache import PrefixCache
from rgtg_fast.models.loading import language_runner, reward_runner
from tests.conftest import make_lm, make_rm, tiny_config
from tests.models.tiny_families import outcome, tiny_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LONG = [1.0, 1.5, 3.0, 6.0]
ROPES = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": LONG,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
}


def refused(load: Callable[[], object]) -> str:
    with pytest.raises(RGTGError) as error:
        load()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_attention_of_another_scale(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = PrefixCache.attend
    monkeypatch.setattr(
        PrefixCache,
        "attend",
        lambda self, layer, q, k, v, scale, *how: attend(self, layer, q, k, v, 1.02 * scale, *how),
    )
    model = tiny_model("lm", "Qwen2Config", dtype)
    assert "cached forward differs" in refused(lambda: language_runner(model, "transformers", None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("family", "settings", "named"),
    [
        ("GraniteConfig", {"logits_scaling": 1.02}, "logits_scaling=1.02"),
        ("CohereConfig", {"logit_scale": 0.98}, "logit_scale=0.98"),
    ],
)
def test_logits_that_are_scaled(
    family: str, settings: dict[str, float], named: str, dtype: torch.dtype
) -> None:
    model = tiny_model("lm", family, dtype, **settings)
    assert named in refused(lambda: language_runner(model, "auto", None))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cap_of_the_logits_is_the_models_own(dtype: torch.dtype) -> None:
    model = tiny_model("lm", "NanoChatConfig", dtype, final_logit_softcapping=50.0)
    model.get_output_embeddings().weight.data *= 0.1  # logits so small that no cap changes them
    runner = language_runner(model, "auto", None)
    for wrong in (None, 40.0):
        runner.logit_softcap = wrong
        assert "final_logit_softcapping=50.0" in refused(lambda: verification.verify(runner))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rewards_that_are_capped(dtype: torch.dtype) -> None:
    model = make_rm(dtype=dtype)
    forward = model.forward

    def capped(*args: object, **kwargs: object) -> object:
        found = forward(*args, **kwargs)
        found.logits = 30 * torch.tanh(found.logits / 30)
        return found

    model.forward = capped
    assert "its logits differ" in refused(lambda: reward_runner(model, "auto", None))


@pytest.mark.parametrize("engine", ["auto", "transformers"])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_a_score_head_with_a_bias_is_served(engine: str, dtype: torch.dtype) -> None:
    model = make_rm()
    model.score = torch.nn.Linear(32, 1)
    model.score.bias.data.fill_(3.0)
    runner = reward_runner(model.to(dtype), engine, None)
    runner.reserve(1, 8)
    runner.prefill(0, [5, 6])
    found = float(runner.scores(runner.step(torch.tensor([[7]])))[0, 0])
    expected = float(model(torch.tensor([[5, 6, 7]])).logits[0, 0])
    assert found == pytest.approx(
        expected, abs=1e-4 if dtype == torch.float32 else 0.05 * abs(expected) + 0.05
    )


@pytest.mark.parametrize("kind", ["lm", "reward"])
@pytest.mark.parametrize("rope", ROPES)
def test_ropes_are_served_for_the_whole_context(rope: str, kind: str) -> None:
    settings = {"rope_parameters": ROPES[rope], "max_position_embeddings": 64}
    model = tiny_model(kind, "LlamaConfig", **settings)
    for engine in ("auto", "transformers"):
        assert outcome(kind, model, engine) == "served"
    load = language_runner if kind == "lm" else reward_runner
    assert load(model, "auto", None).limit == 64
    assert load(model, "auto", 16).limit == 16


def test_an_unknown_rope_is_named() -> None:
    model = make_lm()
    model.config.rope_parameters["rope_type"] = "spiral"
    assert "rope type 'spiral' is unknown" in refused(lambda: language_runner(model, "auto", None))


def test_an_unknown_kind_of_layer_is_named() -> None:
    model = tiny_model("lm", "Qwen2Config")
    model.config.layer_types = ["full_attention", "strided_attention", "full_attention", "full_attention"]
    assert "'strided_attention'" in refused(lambda: language_runner(model, "auto", None))


def test_the_probe_exceeds_the_original_context() -> None:
    model = tiny_model("lm", "LlamaConfig", rope_parameters=ROPES["yarn"], max_position_embeddings=64)
    assert len(verification.probe(language_runner(model, "auto", None))) == 18
    assert len(verification.probe(language_runner(model, "auto", 9))) == 9
    assert len(verification.probe(language_runner(make_lm(), "auto", None))) == 6


@torch.inference_mode()
def test_a_window_set_after_loading_is_refused_when_it_is_reached() -> None:
    model = tiny_model("lm", "MistralConfig", sliding_window=None)
    runner = language_runner(model, "transformers", None)
    model.config.sliding_window = 8
    runner.reserve(1, 8)
    runner.prefill(0, [5, 6, 7])
    runner.reserve(1, 9)
    assert "sliding window of 8 tokens" in refused(lambda: runner.prefill(0, [5, 6, 7]))


def test_a_refused_model_keeps_its_attention() -> None:
    model = tiny_model("lm", "CohereConfig")
    model.set_attn_implementation("eager")
    refused(lambda: language_runner(model, "auto", None))
    assert model.config._attn_implementation == model.model.config._attn_implementation == "eager"
    served = tiny_model("lm", "GPT2Config")
    language_runner(served, "auto", None)
    assert served.config._attn_implementation == NAME


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output_attentions", True),
        ("output_hidden_states", True),
        ("return_dict", False),
        ("use_cache", False),
        ("tie_word_embeddings", True),
        ("problem_type", "regression"),
        ("attention_dropout", 0.5),
    ],
)
@pytest.mark.parametrize("engine", ["auto", "transformers"])
def test_config_settings_that_change_no_result(name: str, value: object, engine: str) -> None:
    def made(auto: type, **settings: object) -> tf.PreTrainedModel:
        torch.manual_seed(0)
        config = tiny_config(**settings)
        if name == "tie_word_embeddings":  # a structure, not an output
            config.tie_word_embeddings = value
        return auto.from_config(config)

    def answer(lm: tf.PreTrainedModel, rm: tf.PreTrainedModel) -> tuple[list[int], list[float], list[float]]:
        decoder = RewardGuidedDecoder.from_pretrained(
            (lm, None), reward=SequenceReward((rm, None)), engine=engine
        )
        row = decoder.generate([[5, 6]], 4, guidance=Guidance(k=4, temperature=0))[0]
        return row.tokens, row.rewards, decoder.reward.score_answer(_prefix([5, 6]), row.tokens)

    def pair() -> tuple[tf.PreTrainedModel, tf.PreTrainedModel]:
        return made(tf.AutoModelForCausalLM), made(tf.AutoModelForSequenceClassification, num_labels=1)

    expected = answer(*pair())
    lm, rm = pair()
    for model in (lm, rm):
        if name == "output_attentions":  # possible with this attention alone
            model.set_attn_implementation("eager")
        setattr(model.config, name, value)
        for layer in model.base_model.layers:
            layer.self_attn.attention_dropout = getattr(model.config, "attention_dropout", 0.0)
        model.train()
    tokens, rewards, scores = answer(lm, rm)
    assert (tokens, rewards) == expected[:2]
    assert scores == pytest.approx(expected[2], abs=1e-5)  # by the attention of the model's owner


def _prefix(ids: list[int]) -> object:
    from rgtg_fast.models.prompts import Prompt
    from rgtg_fast.rewards.base import Prefix

    return Prefix(Prompt(ids), ids)


def test_float32_comparison_uses_the_half_precision_weights() -> None:
    """Equal to the forward of a copy of the model in float32."""
    model = tiny_model("lm", "MixtralConfig", torch.bfloat16)
    runner, ids = language_runner(model, "transformers", None), [5, 6, 7, 8]
    with torch.inference_mode():
        found = verification._uncached_in_float32(runner, ids, 0)
        model.float().set_attn_implementation("eager")
        expected = model.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
