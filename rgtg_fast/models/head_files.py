"""Recognizes the reward heads in the files of others' models, and loads classifiers with exactly those heads.

transformers' classifiers over causal trunks have one linear layer without bias, `score`. Other heads, by the code that
comes with the models:

- OpenRLHF's `get_llm_for_sequence_regression`: `value_head` (or `value_head_prefix`), linear; (r − mean) / std where
  the configuration says `normalize_reward`;
- UltraRM and Eurus: `regression_head`, linear;
- GRM: `v_head.summary`, an MLP with ReLU in float32, or linear (`vhead_layer_type`);
- INF-ORM and Qwen2.5-Math-RM: `score`, an MLP with ReLU.

All of them are read at a text's last token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from rgtg_fast.errors import RGTGError, shown
from rgtg_fast.models.checkpoint import names, weight_shapes
from rgtg_fast.models.heads import SCORE, activation_of, label_index, normalization, with_reward_head
from rgtg_fast.models.state_dict import wrapper_of

Shapes = Mapping[str, tuple[int, ...]]

_OWN_CODE = "use another reward model, or TextReward(f) with a function f that calls its own code"
_STEPS = "is a process reward model: it scores the ends of steps, not every token"
_GATING = (
    "weighs several scores by a network (as ArmoRM, QRM and URM do), and a plain head gives other rewards"
)
_OWN_TOKEN = "has a reward that is read at a token of its own (as InternLM2-reward and Athene do)"
# By architectures: parts of their names.
_REFUSED_ARCHITECTURES = {
    "WithGating": _GATING,
    "WithNormal_Weights": _GATING,
    "InternLM2ForRewardModel": _OWN_TOKEN,
    "AtheneFor": _OWN_TOKEN,
    "ProcessRewardModel": _STEPS,
    "ForPrm": _STEPS,
    "ForPRM": _STEPS,
}
# By names of weights.
_REFUSED_WEIGHTS = {
    "gating.": _GATING,
    "regression_layer.": _GATING,
    "reward_transform_matrix": _GATING,
    "v_head.weight": _OWN_TOKEN,
}
# The head's names in the files begin with one of these, `value_head_prefix` before all.
_PREFIXES = (f"{SCORE}.", "value_head.", "regression_head.", "v_head.summary.")
# Architectures whose `score` is known to be Linear, ReLU, Linear.
_RELU = ("INFORMForSequenceClassification", "Qwen2ForRewardModel")
# Files that hold a head alone.
_HEAD_FILES = ("value_head.safetensors", "value_head.bin")
_PART = re.compile(r"(?:(\d+)\.)?(weight|bias)")


@dataclass(frozen=True)
class FileHead:
    """The layers of a reward head as a model's files hold them.

    Attributes:
        prefix: how its weights' names begin: "value_head.".
        sizes: (outputs, inputs) of the linear layers.
        biases: whether each has a bias.
        numbered: whether the layers are numbered, as those of an `nn.Sequential` are.
    """

    prefix: str
    sizes: tuple[tuple[int, int], ...]
    biases: tuple[bool, ...]
    numbered: bool

    @classmethod
    def of(cls, shapes: Shapes, config: Any, name: object) -> FileHead | None:
        """The head among a model's weights; None where there is none, or one of another kind.

        Args:
            shapes: of the weights in the files.
            config: the model's configuration.
            name: the model, for messages.

        Raises:
            RGTGError: an MLP whose functions between the layers are not known, or weights that are neither.
        """
        own = getattr(config, "value_head_prefix", None)
        prefixes = [*([f"{own}."] if isinstance(own, str) else []), *_PREFIXES]
        prefix = next((x for x in prefixes if any(key.startswith(x) for key in shapes)), None)
        if prefix is None:
            return None
        # Under the name of the model's own head another one would be loaded in its place.
        other = [key for key in shapes if key.startswith(f"{SCORE}.") and prefix != f"{SCORE}."]
        if other:
            raise RGTGError(
                f"{name} has two reward heads, {prefix + '*'!r} and {names(other)}: save it with the one that "
                "gives its rewards"
            )
        parts = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
        found = [_PART.fullmatch(part) for part in parts]
        irregular = (
            f"{name} has the weights {names(prefix + part for part in parts)}, which are neither a linear head nor an "
            f"MLP: {_OWN_CODE}"
        )
        if any(match is None for match in found):
            if prefix == f"{SCORE}.":  # a family's own head, as T5Gemma's
                return None
            raise RGTGError(irregular)
        places = sorted({match[1] or "" for match in found if match is not None}, key=lambda x: (len(x), x))
        steps = [f"{place}." if place else "" for place in places]
        weights = [parts.get(f"{step}weight", ()) for step in steps]
        if any(len(weight) != 2 for weight in weights) or ("" in places and len(places) > 1):
            raise RGTGError(irregular)
        head = cls(
            prefix,
            tuple((weight[0], weight[1]) for weight in weights),
            tuple(f"{step}bias" in parts for step in steps),
            places != [""],
        )
        regular = not head.numbered or [int(place) for place in places] == [2 * i for i in range(len(places))]
        if not regular or (len(places) > 1 and not _has_relu(prefix, config)):
            made_as = (getattr(config, "architectures", None) or ["unknown"])[0]
            layers = ", ".join(prefix + place for place in places)
            raise RGTGError(
                f"{name} ({made_as}) has an MLP as its head ({layers}) and its files do not say which functions are "
                f"between its layers: {_OWN_CODE}"
            )
        return head

    @property
    def labels(self) -> int:
        """Outputs of the head."""
        return self.sizes[-1][0]

    @property
    def usual(self) -> bool:
        """Whether transformers' classifiers have such a head."""
        return self.prefix == f"{SCORE}." and not self.numbered and self.biases == (False,)

    def module(self) -> nn.Linear | nn.Sequential:
        """The head's layers, not yet loaded, under the names that the files give them after the prefix."""
        layers: list[nn.Module] = []
        for (outputs, inputs), bias in zip(self.sizes, self.biases, strict=True):
            layers += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
        return nn.Sequential(*layers[:-1]) if self.numbered else layers[0]  # pyright: ignore[reportReturnType]


def _has_relu(prefix: str, config: Any) -> bool:
    made_as = getattr(config, "architectures", None) or []
    return prefix == "v_head.summary." or any(name in _RELU for name in made_as)


class ClassifierLoader:
    """Loads a sequence classifier with the head that its files hold, in the place of transformers' loader.

    Args:
        loader: transformers' class, `AutoModelForSequenceClassification`.
        source: folder or hub id.
        label: as in `label_index`.
    """

    def __init__(self, loader: Any, source: Any, label: str | int | None):
        self._loader, self._source, self._label = loader, source, label
        self._raw = _raw_config(source)
        self._head: FileHead | None = None
        # An architecture whose configuration needs code is refused here by its name.
        _refuse_architectures(self._raw, source)
        _refuse_label_fields(self._raw, source)

    def configure(self, config: Any) -> None:
        """Recognizes the head, and sets the number of labels where the configuration leaves it open.

        Raises:
            RGTGError: a head that cannot be served, or one that does not fit the configuration.
        """
        # A GGUF file is read as the folder of its conversion.
        shapes = weight_shapes(config._name_or_path or self._source) or {}
        _refuse_weights(shapes, config, self._source)
        head = FileHead.of(shapes, config, self._source)
        # Before the weights are read.
        normalization(config, self._source)
        activation_of(config, self._source)
        wrapped = wrapper_of(shapes) if head is None else None
        if wrapped is not None:
            raise RGTGError(
                f"{self._source} has names that begin with {wrapped[0]!r}: it was saved from {wrapped[1]}"
            )
        if head is None:
            _refuse_separate_head(self._source)
            check_labels(config, self._label, self._source)
            return
        # transformers' default is two labels, whatever the head.
        if head.labels == 1 and not {"id2label", "num_labels"} & self._raw.keys():
            config.num_labels = 1
        if head.labels == config.num_labels:
            label_index(config, self._label, self._source)
        elif head.labels == 1 or not head.usual:
            raise RGTGError(
                f"{self._source} has a head of {head.labels} labels and its config.json lists {config.num_labels}: "
                "restore the config.json that belongs to the weights"
            )
        if not head.usual:
            self._check_width(head, config)
            self._head = head

    def from_pretrained(self, source: Any, config: Any, **settings: Any) -> Any:
        """As transformers' loader of the same name."""
        if self._head is None:
            return self._loader.from_pretrained(source, config=config, **settings)
        try:
            kind = self._loader._model_mapping[type(config)]
        except KeyError:
            kind = None
        if kind is None:
            raise RGTGError(f"{self._source} is of a family without sequence classifiers: {_OWN_CODE}")
        prefix = self._head.prefix
        renamed = {} if prefix == f"{SCORE}." else {f"^{re.escape(prefix)}": f"{SCORE}."}
        loaded = _with_head(kind, self._head, self._source).from_pretrained(
            source, config=config, key_mapping=renamed or None, **settings
        )
        (loaded[0] if isinstance(loaded, tuple) else loaded).__class__ = kind
        return loaded

    def finished(self, model: PreTrainedModel) -> PreTrainedModel:
        """The loaded model with the head that gives its rewards."""
        return with_reward_head(model, self._label, self._source)

    def _check_width(self, head: FileHead, config: Any) -> None:
        text = config.get_text_config()
        width = getattr(text, "word_embed_proj_dim", None) or getattr(text, "hidden_size", None)
        widths = [width, *(outputs for outputs, _ in head.sizes[:-1])]
        for (outputs, inputs), before in zip(head.sizes, widths, strict=True):
            if before is not None and inputs != before:
                raise RGTGError(
                    f"{self._source} has a head on {inputs} numbers ({head.prefix}* [{outputs}, {inputs}]) where "
                    f"{before} come before it: restore the files that belong together"
                )


def check_labels(config: Any, label: str | int | None, name: object) -> None:
    """Refuses a classifier with several labels of which none is chosen.

    Args:
        config: the model's configuration.
        label: as in `label_index`.
        name: the model, for messages.

    Raises:
        RGTGError: it has several labels; a causal language model by default has two.
    """
    made_as = (config.architectures or [""])[0]
    if label is None and config.num_labels != 1 and made_as and "Classif" not in made_as:
        raise RGTGError(
            f"{name} has {config.num_labels} labels and a reward model needs 1 (it was saved as {made_as}, which has "
            "no reward head; process reward models that answer in tokens have none either): use a model with "
            "num_labels=1"
        )
    label_index(config, label, name)


def _with_head(kind: Any, head: FileHead, source: object) -> Any:
    """A class of models that has a head's layers as its `score`, for loading."""

    class WithHead(kind):
        # A head is rounded by its own file alone, not to the dtype of the trunk.
        _keep_in_fp32_modules_strict = frozenset({*(kind._keep_in_fp32_modules_strict or ()), SCORE})

        def __init__(self, config: Any, *args: Any, **settings: Any):
            super().__init__(config, *args, **settings)
            if not isinstance(dict(self.named_children()).get(SCORE), nn.Linear):
                raise RGTGError(
                    f"{source} has the reward head {head.prefix}* and {kind.__name__} has no `score` head over a "
                    f"causal trunk: {_OWN_CODE}"
                )
            self.score = head.module()

    WithHead.__name__, WithHead.__qualname__, WithHead.__module__ = (
        kind.__name__,
        kind.__qualname__,
        kind.__module__,
    )
    return WithHead


# ---- refusals --------------------------------------------------------------------------------------------------------


def _raw_config(source: Any) -> dict[str, Any]:
    """What a model's config.json holds; empty where it cannot be read, which loading reports."""
    try:
        return PretrainedConfig.get_config_dict(source)[0]
    except Exception:  # noqa: BLE001 - the hub and damaged files raise anything
        return {}


def _refuse_architectures(raw: Mapping[str, Any], name: object) -> None:
    made_as = raw.get("architectures")
    for one in made_as if isinstance(made_as, list) else []:
        for part, reason in _REFUSED_ARCHITECTURES.items():
            if part in str(one):
                raise RGTGError(f"{name} ({one}) {reason}: {_OWN_CODE}")


def _refuse_separate_head(source: object) -> None:
    """Refuses a head in a file of its own, as LLaMA-Factory saves it beside a language model."""
    found = [file for file in _HEAD_FILES if Path(str(source), file).is_file()]
    if found:
        raise RGTGError(
            f"{source} has its reward head in a file of its own ({found[0]}), which is not read: save all weights in "
            "model.safetensors, those of the head as 'value_head.weight' and 'value_head.bias'"
        )


def _refuse_label_fields(raw: Mapping[str, Any], name: object) -> None:
    """Refuses labels that transformers cannot read, by name."""
    count, texts = raw.get("num_labels", 1), raw.get("id2label")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise RGTGError(
            f"{name} has num_labels={shown(count)} in its config.json: put the number of labels there"
        )
    numbered = isinstance(texts, dict) and all(str(index).isdecimal() for index in texts)
    if not numbered and texts is not None:
        raise RGTGError(
            f"{name} has id2label={shown(texts)} in its config.json: put names by number there, as in "
            '{"0": "bad", "1": "good"}'
        )


def _refuse_weights(shapes: Shapes, config: Any, name: object) -> None:
    for key in sorted(shapes):
        for start, reason in _REFUSED_WEIGHTS.items():
            if key.startswith(start):
                raise RGTGError(f"{name} ({key!r}) {reason}: {_OWN_CODE}")
    if "v_head.summary.weight" in shapes and getattr(config, "vhead_layer_type", None) != "linear":
        raise RGTGError(
            f"{name} ('v_head.summary.weight') has a value head as Skywork-o1-PRM has, whose scores hold at the ends "
            f"of steps alone: {_OWN_CODE}; where its score is that of a whole text, put "
            '"vhead_layer_type": "linear" into its config.json'
        )
