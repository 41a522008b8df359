"""The models and prompts of a benchmark: real ones by name, or random weights in the sizes of real ones.

Where no reward model is named, the sequence model is the base model's trunk with a seeded random head, and an adapter
is a seeded random one of rank 16 on the upper third of the layers. The second language model of `genarm_published` and
`ours_genarm` is always the base model's trunk in memory of its own with a seeded random vocabulary head.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rgtg_fast import bundled
from rgtg_fast.bench.methods import BenchMethod, RewardModel
from rgtg_fast.errors import RGTGError
from rgtg_fast.models.adapter import Adapter, LowRank, decoder_layers, is_adapter, linear_shape
from rgtg_fast.models.fingerprint import fingerprint
from rgtg_fast.models.loading import load_causal_lm, load_sequence_classifier

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Sizes of real models, to be filled with random weights. "tiny" is for trying the command out.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
}

# The random adapter: of so many parts of the layers the uppermost, all linear layers, this rank.
_ADAPTER_SHARE, _ADAPTER_RANK = 3, 16


def base_model(
    lm: str | None, shape: str | None, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The base model and its tokenizer; random weights of a shape come without a tokenizer."""
    tokenizer = None
    if shape is not None:
        config = LlamaConfig(**SHAPES[shape], bos_token_id=None, eos_token_id=None, pad_token_id=0)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    else:
        assert lm is not None
        model, tokenizer = load_causal_lm(lm, device, dtype)
        assert tokenizer is not None
        tokenizer.eos_token = None
    # every method has to produce the same number of tokens, so nothing may end a row
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    return model.eval(), tokenizer


def _sequence_model(
    rm: str | None, base: PreTrainedModel, dtype: torch.dtype, device: torch.device, seed: int
) -> PreTrainedModel:
    if rm is not None:
        return load_sequence_classifier(rm, base, dtype)[0]
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    config.pad_token_id = 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        model = AutoModelForSequenceClassification.from_config(config, dtype=dtype, trust_remote_code=False)
    # a copy, not the same weights: a guided step must read both models' from memory
    model.base_model.load_state_dict(base.base_model.state_dict())
    head = model.get_submodule("score").weight
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(head.shape, generator=generator) / head.shape[1] ** 0.5
    model.get_submodule("score").weight = torch.nn.Parameter(values.to(device=device, dtype=dtype))
    return model.eval()


def second_language_model(base: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A copy of the base model in memory of its own, with a random vocabulary head in the place of the base's."""
    model = copy.deepcopy(base)
    replaced = base.get_output_embeddings()
    assert replaced is not None
    own = replaced.weight
    generator = torch.Generator(own.device).manual_seed(seed)
    values = torch.randn(own.shape, generator=generator, device=own.device) / own.shape[1] ** 0.5
    # Another module: where embeddings are tied, writing into the head's weight would change the input's too.
    head = torch.nn.Linear(own.shape[1], own.shape[0], bias=False, device="meta")
    head.weight = torch.nn.Parameter(values.to(own.dtype))
    model.set_output_embeddings(head)
    model.config.tie_word_embeddings = False
    return model.eval()


def find_adapter(
    rm: str | None, base: PreTrainedModel, methods: Iterable[BenchMethod], seed: int
) -> Adapter | None:
    """The adapter that `rm` names, or a random one where a method needs one and `rm` is None.

    Raises:
        RGTGError: the adapter is of another base model, or a method needs an adapter and `rm` is not one.
    """
    if rm is not None and is_adapter(bundled.resolve(rm)):
        adapter = Adapter.load(bundled.resolve(rm))
        reason = adapter.base_mismatch(base)
        if reason is not None:
            raise RGTGError(f"{reason}: name its base model with lm")
        return adapter
    asking = [method.name for method in methods if method.reward.is_adapter]
    if not asking:
        return None
    if rm is not None:
        raise RGTGError(
            f"rm={rm!r} is not an adapter folder, which {asking[0]} needs: name one, or leave rm out"
        )
    return _random_adapter(base, seed)


def _random_adapter(base: PreTrainedModel, seed: int) -> Adapter:
    layers = decoder_layers(base)
    generator = torch.Generator().manual_seed(seed)
    low_rank = {}
    for number in range(len(layers) - max(len(layers) // _ADAPTER_SHARE, 1), len(layers)):
        for name, module in layers[number].named_modules():
            shape = linear_shape(module)
            if shape is None:
                continue
            a = torch.randn(_ADAPTER_RANK, shape[1], generator=generator) / shape[1] ** 0.5
            b = torch.randn(shape[0], _ADAPTER_RANK, generator=generator) / (10 * _ADAPTER_RANK**0.5)
            low_rank[number, name] = LowRank(a, b)
    head = torch.nn.Linear(base.config.hidden_size, 1, bias=False)
    values = torch.randn(head.weight.shape, generator=generator) / head.in_features**0.5
    head.weight = torch.nn.Parameter(values, requires_grad=False)
    return Adapter("a random adapter", "", fingerprint(base), low_rank, head, "score")


def clone_modules(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in other modules: what one method sets on its modules does not affect the other methods."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=shared)


def random_prompts(
    tokenizer: PreTrainedTokenizerBase | None, vocabulary: int, batch: int, length: int, seed: int
) -> list[list[int]]:
    """Prompts [batch][length] of random ids, special tokens excluded."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder) if tokenizer else set()
    ordinary = torch.tensor([token for token in range(vocabulary) if token not in special])
    ids = torch.randint(len(ordinary), (batch, length), generator=torch.Generator().manual_seed(seed))
    return ordinary[ids].tolist()


@dataclass
class RewardModels:
    """The reward models of one benchmark; each is None where no method needs it.

    Attributes:
        adapter: adapter of the base model.
        sequence: sequence-classification model; the adapter merged into its base where there is one.
        language_model: causal language model.
    """

    adapter: Adapter | None = None
    sequence: PreTrainedModel | None = None
    language_model: PreTrainedModel | None = None

    @classmethod
    def load(
        cls,
        rm: str | None,
        base: PreTrainedModel,
        methods: Iterable[BenchMethod],
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> RewardModels:
        """What these methods need, and no more.

        Args:
            rm: as in `run_bench`.
            base: base model.
            methods: the methods that are timed.
            dtype: dtype of the reward model.
            device: device of the reward model.
            seed: seed of random weights.

        Raises:
            RGTGError: a reward model that cannot be loaded, or does not fit the base model or a method.
        """
        methods = list(methods)
        needs = {method.reward for method in methods}
        found = cls(find_adapter(rm, base, methods, seed))
        if RewardModel.SEQUENCE in needs:
            found.sequence = (
                _sequence_model(rm, base, dtype, device, seed)
                if found.adapter is None
                else found.adapter.merged(base)
            )
        if RewardModel.LANGUAGE_MODEL in needs:
            found.language_model = second_language_model(base, seed)
        return found

    def model_of(self, method: BenchMethod) -> PreTrainedModel | None:
        """The model that a method runs beside the base model."""
        if method.reward is RewardModel.NONE:
            return None
        return self.language_model if method.reward is RewardModel.LANGUAGE_MODEL else self.sequence
