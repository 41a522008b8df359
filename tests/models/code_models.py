"""Tiny folders of models that come with code of their own (auto_map)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.conftest import make_lm, make_rm, make_tokenizer

CONFIG = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own"
"""
# A Llama of its own class; what it multiplies its logits by is no head's work.
MODEL = """
import pathlib

from torch import nn
from transformers import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from .configuration_own import OwnConfig

pathlib.Path({ran!r}).touch()


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * {scale}
        return output


class OwnForSequenceClassification(LlamaPreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **settings):
        settings.pop("return_dict", None)
        states = self.model(input_ids, attention_mask=attention_mask, **settings).last_hidden_state
        return SequenceClassifierOutputWithPast(logits=self.score(states)[:, -1])
"""


def save(folder: Path, ran: Path, head: bool = False, scale: float = 1.0, repository: str = "") -> Path:
    """Saves a model whose folder holds its code.

    Args:
        folder: the new folder.
        ran: a file that the code creates when it runs.
        head: a reward model instead of a language model.
        scale: by what its forward multiplies the logits of its head.
        repository: a repository in which its auto_map says the code is, instead of the folder.
    """
    model: Any = (make_rm if head else make_lm)()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    where = f"{repository}--" if repository else ""
    auto = {
        "AutoConfig": f"{where}configuration_own.OwnConfig",
        "AutoModelForCausalLM": f"{where}modeling_own.OwnForCausalLM",
        "AutoModelForSequenceClassification": f"{where}modeling_own.OwnForSequenceClassification",
    }
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "own", "auto_map": auto}))
    (folder / "configuration_own.py").write_text(CONFIG)
    (folder / "modeling_own.py").write_text(MODEL.format(ran=str(ran), scale=scale))
    return folder
