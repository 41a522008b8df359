"""A tiny model of every family of transformers, and the checks of a model that is served or refused."""

from __future__ import annotations

import contextlib
import copy
import re
from typing import Any

import torch
import transformers as tf
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from rgtg_fast import RGTGError
from rgtg_fast.models.loading import language_runner, reward_runner

KINDS = {
    "lm": (MODEL_FOR_CAUSAL_LM_MAPPING, tf.AutoModelForCausalLM, language_runner),
    "reward": (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        tf.AutoModelForSequenceClassification,
        reward_runner,
    ),
}
# A larger model has a size that is missing in the table below.
_PARAMETERS = 8_000_000

_SIZES: dict[Any, str] = {
    32: "hidden_size n_embd d_model dim embed_dim word_embed_proj_dim embedding_size input_embedding_size "
    "embedding_dim emb_dim entity_emb_size lru_width dim_model",
    48: "intermediate_size ffn_dim d_ff ffn_hidden_size moe_intermediate_size n_inner block_ff_dim dim_ff d_inner "
    "shared_expert_intermediate_size intermediate_size_mlp encoder_ffn_dim decoder_ffn_dim expert_ffn_hidden_size "
    "shared_intermediate_size moe_shared_expert_intermediate_size prefix_dense_intermediate_size",
    4: "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers num_decoder_layers "
    "num_encoder_layers num_attention_heads n_head n_heads num_heads encoder_attention_heads "
    "decoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts "
    "n_experts qk_rope_head_dim zero_expert_num index_n_heads linear_num_key_heads linear_num_value_heads",
    2: "num_key_value_heads n_head_kv num_experts_per_tok moe_topk moe_k num_experts_per_token top_k_experts moe_top_k "
    "num_layers_per_block",
    1: "n_shared_experts n_group topk_group num_shared_experts moe_num_shared_experts eos_token_id bos_token_id "
    "index_topk_blocks index_local_blocks",
    8: "head_dim d_head global_head_dim d_kv attention_head_dim kv_channels swa_head_dim v_head_dim rotary_dim "
    "hidden_size_per_layer_input qk_nope_head_dim kv_lora_rank q_lora_rank index_head_dim state_size "
    "ssm_state_size mamba_d_state time_step_rank mamba_dt_rank linear_key_head_dim linear_value_head_dim "
    "mamba_head_dim mamba_d_head index_topk num_latents d_latents index_block_size lm_head_dim mamba_n_heads",
    64: "vocab_size vocab_size_per_layer_input n_words pronunciation_vocab_size shape_vocab_size entity_vocab_size "
    "unpadded_vocab_size padded_vocab_size mamba_d_ssm "
    "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length max_target_positions",
    24: "sliding_window attention_window_size attention_chunk_size local_window_size window_size floor_scale",
    0.2: "initializer_range init_std initializer_factor",
    0: "pad_token_id",
}
_SIZE = {key: size for size, keys in _SIZES.items() for key in keys.split()}
# Sizes that a config derives from others by default.
_ALSO_NONE = frozenset({"head_dim", "num_key_value_heads", "pad_token_id", "bos_token_id", "eos_token_id"})
# What a config derives from the number of layers.
_DERIVED = frozenset(
    [
        "layer_types",
        "no_rope_layers",
        "moe_layers",
        "mlp_layer_types",
        "rope_parameters",
        "rope_scaling",
        "per_layer_config",
    ]
)
_GENERAL = frozenset(
    [
        "transformers_version",
        "model_type",
        "architectures",
        "dtype",
        "_name_or_path",
        "auto_map",
        "id2label",
        "label2id",
    ]
)
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


# Families with further constraints on their sizes.
_SETTINGS: dict[str, dict[str, object]] = {
    "Dots1Config": {"n_routed_experts": 4},
    "DoryConfig": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "EsmConfig": {"vocab_size": 64},
    "EsmcConfig": {"num_key_value_heads": 4},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 2},
    "Mamba2Config": {"num_heads": 8},
    "ReformerConfig": {"is_decoder": True, "axial_pos_embds": False},
    "XLNetConfig": {"d_head": 8},
    "ZayaConfig": {"num_experts_per_tok": 1},
}


class UnbuiltError(Exception):
    """No tiny model of a family can be made from the table of sizes."""


def families(kind: str) -> dict[str, type]:
    """The config classes of a kind of model by name."""
    return {config.__name__: config for config in KINDS[kind][0]}


def tiny_config(config_class: type, keep_lists: bool = False, **settings: object) -> Any:
    """A config of a few thousand parameters.

    Args:
        keep_lists: lists with an entry for each layer are cut to length, not left to the config.
    """
    return config_class(**{**_shrunk(config_class().to_dict(), keep_lists), **settings})


def _shrunk(fields: dict[str, Any], keep_lists: bool) -> dict[str, Any]:
    layers = next((fields[name] for name in _LAYERS if fields.get(name)), None)
    out: dict[str, Any] = {}
    for key, value in fields.items():
        if key in _GENERAL:
            continue
        if (
            isinstance(value, dict)
            and ("model_type" in value or key.endswith("_config"))
            and key not in _DERIVED
        ):
            out[key] = _shrunk(value, keep_lists)
            if "model_type" in value:
                out[key]["model_type"] = value["model_type"]
        elif isinstance(value, list) and layers and len(value) == layers and keep_lists:
            out[key] = [*value[:3], value[-1]]
        elif key in _DERIVED:
            continue
        elif key in _SIZE and (value is not None or key in _ALSO_NONE):
            out[key] = _SIZE[key]
        else:
            out[key] = value
    return out


def tiny_model(
    kind: str, family: str, dtype: torch.dtype = torch.float32, **settings: object
) -> tf.PreTrainedModel:
    """A model of a family with random weights, norms and biases among them.

    Raises:
        UnbuiltError: the table gives none, with the reason.
    """
    config_class, auto = families(kind)[family], KINDS[kind][1]
    reason = "?"
    for keep_lists in (False, True):
        try:
            config = tiny_config(config_class, keep_lists, **{**_SETTINGS.get(family, {}), **settings})
            if kind == "reward":
                config.num_labels = 1
            with torch.device("meta"):
                size = sum(p.numel() for p in auto.from_config(copy.deepcopy(config)).parameters())
            if size > _PARAMETERS:
                reason = f"{size} parameters"
                continue
            torch.manual_seed(0)
            model = auto.from_config(config)
        except Exception as error:  # noqa: BLE001 - whatever a family's config or constructor raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            continue
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        return model.to(dtype).eval()
    raise UnbuiltError(reason)


def outcome(kind: str, model: tf.PreTrainedModel, engine: str) -> str:
    """Checks that a model is served correctly or refused properly; returns "served" or the message.

    A served model must equal its own uncached forward over a ragged batch of prefixes, up to the length that is served.
    A refused one must work as before, and must be served with the `max_length` that the message offers.
    """
    reference, load = copy.deepcopy(model), KINDS[kind][2]
    with torch.inference_mode():
        try:
            runner = load(model, engine, None)
        except RGTGError as error:
            line = str(error)
            assert "\n" not in line
            assert type(model).__name__ in line or "Attention" in line, line
            _unchanged(model, reference)
            hint = re.search(r"max_length=(\d+) works", line)
            if hint is None:
                return line
            runner = load(model, engine, int(hint[1]))
        largest = _largest_difference(kind, runner, reference)
    assert largest <= 1e-4, (runner.engine, largest)
    return "served"


def _unchanged(model: Any, reference: Any) -> None:
    text = torch.tensor([[5, 6, 7, 8]])
    with contextlib.suppress(Exception):  # a model that cannot run by itself
        expected = reference(text, use_cache=False).logits
        assert torch.equal(model(text, use_cache=False).logits, expected), "a refused model has changed"


def _largest_difference(kind: str, runner: Any, reference: Any) -> float:
    steps, largest = 3, 0.0
    longest = min(runner.limit, 40)
    texts = [[2 + (5 * i + j) % 61 for i in range(n)] for j, n in enumerate((longest - steps, 1, 4))]
    runner.reserve(len(texts), longest)
    for slot, text in enumerate(texts):
        runner.prefill(slot, text[:-1] if kind == "lm" else text)
    for step in range(steps):
        tokens = torch.tensor([[text[-1]] for text in texts])
        if kind == "reward":
            tokens = torch.tensor([[10 + step, 20 + row, 30] for row in range(len(texts))])
        hidden = runner.step(tokens)
        found = runner.logits(hidden[:, 0]) if kind == "lm" else runner.scores(hidden)
        runner.commit(torch.zeros(len(texts), dtype=torch.int64))
        for row, text in enumerate(texts):
            if kind == "lm":
                expected = reference(torch.tensor([text]), use_cache=False).logits[0, -1]
                text.append(40 + 3 * step + row)
            else:
                expected = torch.cat(
                    [
                        reference(torch.tensor([[*text, t]]), use_cache=False).logits[0]
                        for t in tokens[row].tolist()
                    ]
                )
                text.append(int(tokens[row, 0]))
            difference = float((found[row] - expected).abs().max())
            largest = max(largest, difference if difference == difference else float("inf"))
    return largest
