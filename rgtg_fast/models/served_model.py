"""A base language model that another engine executes, as rewards see it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.adapter import is_adapter
from rgtg_fast.models.device import resolve_device, resolve_dtype
from rgtg_fast.models.gguf import gguf_file
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.loading import ModelAndTokenizer, language_runner, load_causal_lm
from rgtg_fast.models.pretrained import read_description
from rgtg_fast.models.support import context_length, model_name


@dataclass
class ServedModel(LanguageModel):
    """A base model that another engine decodes with.

    Attributes:
        source: what its weights are read from, should a reward need them: a path or hub id, or the loaded pair.
        trust_remote_code: whether code that comes with it may run.
    """

    source: str | os.PathLike[str] | ModelAndTokenizer = ""
    trust_remote_code: bool = False

    @property
    def shares_forward(self) -> bool:
        return False

    def pair(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        return load_causal_lm(self.source, self.runner.device, self.runner.dtype, self.trust_remote_code)

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] | ModelAndTokenizer,
        device: str | torch.device | None,
        dtype: str | torch.dtype | None,
        engine: str,
        max_length: int | None,
        trust_remote_code: bool,
        executed: bool,
    ) -> ServedModel:
        """The base model of a `RequestScorer`; arguments as in its `from_pretrained`.

        Args:
            executed: whether the reward executes it too (contrastive prompts). Otherwise of a folder or hub id only the
                config and the tokenizer are read.

        Raises:
            RGTGError: nothing there, or a model that cannot be served.
        """
        if executed:
            model, tokenizer = load_causal_lm(source, device, dtype, trust_remote_code)
            runner: Any = language_runner(model, engine, max_length)
        else:
            if (
                isinstance(source, (str, os.PathLike))
                and not is_adapter(source)
                and gguf_file(source, f"language model {source!s}") is None
            ):
                place = resolve_device(device)
                kind = resolve_dtype(dtype, place)
                model, tokenizer = read_description(source, "language model", trust_remote_code)
            else:
                model, tokenizer = load_causal_lm(source, device, dtype, trust_remote_code)
                place, kind = model.device, model.dtype
            runner = UnloadedRunner(model, place, kind, max_length)
        vocabulary = min(runner.head.out_features, runner.embeddings)
        return cls(runner, tokenizer, vocabulary, source=source, trust_remote_code=trust_remote_code)


class UnloadedRunner:
    """What a reward asks of a base model that it does not execute; its weights may be absent.

    Args:
        model: the model, possibly on the device "meta".
        device: where the reward's tensors belong.
        dtype: dtype of a reward model that names none.
        max_length: tokens that a row may reach, None for the model's context.
    """

    engine = "none"

    def __init__(
        self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype, max_length: int | None
    ):
        self.model, self.device, self.dtype = model, device, dtype
        self.name = model_name(model)
        context = context_length(model)
        self.limit = context if max_length is None else min(context, max_length)
        head: Any = model.get_output_embeddings()
        embedding: Any = model.get_input_embeddings()
        if not isinstance(head, nn.Linear):
            raise RGTGError(f"{self.name} has no linear vocabulary head: use a causal language model")
        self.head = SimpleNamespace(out_features=head.out_features)
        self.embeddings = int(embedding.weight.shape[0])

    def begin_run(self) -> None:
        """No weights could have changed."""

    check_run = begin_run
