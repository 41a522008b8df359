"""Every model family of transformers gives the numbers of its own forward, or is refused in one line."""

from __future__ import annotations

import pytest
import torch

from tests.models.tiny_families import KINDS, UnbuiltError, families, outcome, tiny_model

# The families of most models; the slow test covers the others.
USUAL = {
    "lm": {
        "LlamaConfig": "served",
        "MistralConfig": "served",
        "MixtralConfig": "served",
        "Qwen2Config": "served",
        "Qwen3Config": "served",
        "GemmaConfig": "served",
        "Gemma2Config": "served",
        "Gemma3TextConfig": "served",
        "PhiConfig": "served",
        "Phi3Config": "served",
        "GPT2Config": "served",
        "GPTNeoXConfig": "served",
        "GPTJConfig": "served",
        "CodeGenConfig": "served",
        "OPTConfig": "served",
        "BloomConfig": "its attention cannot be replaced",
        "FalconConfig": "its attention cannot be replaced",
        "MptConfig": "its attention cannot be replaced",
        "StableLmConfig": "its attention cannot be replaced",
        "CohereConfig": "logit_scale=0.0625",
        "GraniteConfig": "served",
        "Olmo2Config": "served",
        "GptOssConfig": "served",
        "Llama4TextConfig": "its trunk cannot be told from its head",
        "Gemma4TextConfig": "its layers differ in the size of their heads",
        "NanoChatConfig": "served",
        "MambaConfig": "it keeps a recurrent state",
        "BertConfig": "cannot be served",
    },
    "reward": {
        "LlamaConfig": "served",
        "MistralConfig": "served",
        "Qwen2Config": "served",
        "Qwen3Config": "served",
        "GemmaConfig": "served",
        "Gemma2Config": "served",
        "GPT2Config": "served",
        "GPTNeoXConfig": "served",
        "OPTConfig": "served",
        "PhiConfig": "served",
        "BloomConfig": "its attention cannot be replaced",
        "BertConfig": "no one-label `score` head",
    },
}
# Families of which no tiny model can be made, and a part of the error.
UNBUILT = {
    "lm": {
        "BltConfig": "parameters",
        "CohereCompassTextConfig": "full_attention",
        "DbrxConfig": "rope_theta",
        "Dots1Config": "NoneType",
        "Dots3NoteConfig": "num_key_value_heads must match",
        "Dots3NoteTextConfig": "num_key_value_heads must match",
        "Gemma3nConfig": "requires the timm library",
        "Gemma3nTextConfig": "layer types",
        "Gemma4AssistantConfig": "hidden_size_per_layer_input must be 0",
        "Gemma4UnifiedAssistantConfig": "layer types",
        "MusicgenConfig": "dropout",
        "MusicgenMelodyConfig": "dropout",
        "Qwen4ExpConfig": "NoneType",
        "Qwen4ExpTextConfig": "NoneType",
        "ZambaConfig": "tie_weights_keys",
    },
    "reward": {
        "CohereCompassTextConfig": "full_attention",
        "LayoutLMv2Config": "requires the detectron2 library",
        "ZambaConfig": "tie_weights_keys",
    },
}
ENGINES = ("auto", "transformers")


@pytest.mark.parametrize(("kind", "family"), [(kind, family) for kind in KINDS for family in USUAL[kind]])
def test_usual_families(kind: str, family: str) -> None:
    for engine in ENGINES:
        assert USUAL[kind][family] in outcome(kind, tiny_model(kind, family), engine), engine


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_other_family(kind: str) -> None:
    unbuilt, served = {}, 0
    for family in sorted(set(families(kind)) - set(USUAL[kind])):
        try:
            model = tiny_model(kind, family)
        except UnbuiltError as reason:
            unbuilt[family] = str(reason)
            continue
        found = {outcome(kind, model, engine) for engine in ENGINES[1:]}
        served += found == {"served"}
    assert served > 20
    # Older versions of transformers lack some families.
    expected = {family: reason for family, reason in UNBUILT[kind].items() if family in families(kind)}
    assert {family for family in expected if expected[family] in unbuilt.get(family, "")} == set(expected), (
        unbuilt
    )
    assert set(unbuilt) == set(expected)


HALF = [
    "LlamaConfig",
    "GemmaConfig",
    "GPT2Config",
    "MixtralConfig",
    "GraniteConfig",
    "Qwen3MoeConfig",
    "OPTConfig",
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", HALF)
def test_rounding_is_no_reason_to_refuse(family: str, dtype: torch.dtype) -> None:
    for engine in ENGINES:
        assert KINDS["lm"][2](tiny_model("lm", family, dtype), engine, None).dtype == dtype
