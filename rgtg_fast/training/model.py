"""Reward models made from language models: the score head, LoRA adapters from a fork layer on, and merging."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MethodType
from typing import Any, TypeAlias

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.pytorch_utils import Conv1D

from rgtg_fast.errors import RGTGError
from rgtg_fast.files import publish, reason
from rgtg_fast.models.checkpoint import names, safetensors_header
from rgtg_fast.models.heads import activation_of, normalization
from rgtg_fast.models.pretrained import read_pretrained, read_tokenizer
from rgtg_fast.models.quantized import refuse_quantized
from rgtg_fast.training.config import Lora
from rgtg_fast.training.packing import (
    PackedBatch,
    answer_positions,
    forward_arguments,
    pretrained,
    use_packed_attention,
)
from rgtg_fast.training.vocabulary import VOCABULARY_HEAD, load_causal, vocabulary_head

HEAD = "score"
# Computes the rewards [M] of a packed batch's answer tokens from the states [R, S, E] after the final norm.
Reader: TypeAlias = "Callable[[PreTrainedModel, torch.Tensor, PackedBatch], torch.Tensor]"
EXTRA = 'pip install "rgtg-fast[train]"'


def load_base(
    source: str | os.PathLike[str] | tuple[PreTrainedModel, PreTrainedTokenizerBase],
    dtype: torch.dtype = torch.float32,
    progress: Callable[[str], None] = lambda message: None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal model with a one-label score head and its tokenizer; a head that the files lack starts at zero.

    Args:
        source: folder or hub id of a causal language model or of a reward model, or a loaded classifier with its
            tokenizer.
        dtype: dtype of the weights.
        progress: receives one line where the head is new.

    Raises:
        RGTGError: there is no such model, or it has no `score` head over the trunk.
    """
    if isinstance(source, tuple):
        model, tokenizer = source
        if model.config.num_labels != 1:
            raise RGTGError(
                f"{type(model).__name__} has {model.config.num_labels} labels and a reward is 1: use num_labels=1"
            )
        _head(model)
        _check_unscaled(model.config, type(model).__name__)
        refuse_quantized(model, "be trained")
        return model, tokenizer

    def one_label(config: Any) -> None:
        _check_unscaled(config, source)
        config.num_labels = 1

    model, tokenizer, headless = read_pretrained(
        AutoModelForSequenceClassification,
        source,
        "base model",
        dtype,
        configure=one_label,
        new_head=True,
    )
    head = _head(model)
    refuse_quantized(model, "be trained")
    if headless:
        # Starting at 0, the first steps fit the frozen features instead of unlearning a random reward.
        nn.init.zeros_(head.weight)
        progress(f"{source} has no reward head: a new one ({HEAD}) begins at 0")
    _pad_with_another_token_than_eos(model, tokenizer)
    return model, tokenizer


def _check_unscaled(config: Any, name: object) -> None:
    """Refuses a model whose configuration changes its score afterwards: the trained one would keep the change."""
    if normalization(config, name) is not None or activation_of(config, name) is not None:
        raise RGTGError(
            f"{name} normalizes or bounds its score, and training begins with a linear head: start from its base model"
        )


def _pad_with_another_token_than_eos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Keeps padding apart from EOS: transformers' classifiers read the last token that is not padding, here EOS."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        known = [tokenizer.unk_token_id, *tokenizer.all_special_ids]
        other = next((i for i in known if i is not None and i != tokenizer.eos_token_id), None)
        if other is not None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(other)
    model.config.pad_token_id = tokenizer.pad_token_id


def _head(model: PreTrainedModel) -> nn.Linear:
    head = dict(model.named_children()).get(HEAD)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise RGTGError(
            f"{type(model).__name__} has no one-label `score` head over a causal trunk: use a decoder-only model "
            "(Llama, Qwen2, Qwen3, Mistral, Gemma, Phi, GPT-NeoX, GPT-2)"
        )
    return head


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name of the trunk's list of decoder layers, and the list.

    Raises:
        RGTGError: the trunk has no such list.
    """
    trunk: Any = pretrained(model).base_model
    count = trunk.config.get_text_config().num_hidden_layers
    for name, child in trunk.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return name, child
    raise RGTGError(
        f"{type(trunk).__name__} has no list of its {count} decoder layers: use a model of a family that "
        "transformers calls decoder-only"
    )


def check_fork_layer(model: nn.Module, fork_layer: int) -> None:
    """Checks that the model has the fork layer.

    Raises:
        RGTGError: it is not in 0 to the number of layers.
    """
    count = len(decoder_layers(model)[1])
    if not 0 <= fork_layer <= count:
        raise RGTGError(
            f"fork_layer={fork_layer} is not in 0..{count}: the model has {count} layers; {count} trains the score "
            "head alone"
        )


def freeze_below(model: PreTrainedModel, fork_layer: int) -> None:
    """Freezes the embeddings and the layers below the fork; fork layer 0 freezes nothing."""
    if fork_layer == 0:
        return
    name, layers = decoder_layers(model)
    upper = {id(p) for layer in layers[fork_layer:] for p in layer.parameters()}
    trunk = model.base_model
    after = {id(p) for child in _after(trunk, name) for p in child.parameters()}
    for parameter in trunk.parameters():
        parameter.requires_grad_(id(parameter) in upper | after)


def _after(trunk: nn.Module, layers: str) -> list[nn.Module]:
    """The modules that are registered after the layers and run after them: the final norm."""
    children = list(trunk.named_children())
    place = [name for name, _ in children].index(layers)
    return [child for _, child in children[place + 1 :]]


def add_adapters(model: PreTrainedModel, fork_layer: int, lora: Lora, head: str | None = HEAD) -> Any:
    """Adds LoRA to every linear layer from decoder layer `fork_layer` on, and makes the head trainable.

    Args:
        model: the model to adapt.
        fork_layer: 0 adapts every decoder layer, the number of layers none: then only the head is trained.
        lora: settings of the adapters.
        head: "score" for a classifier, "lm_head" for a language model, None to train a language model's adapters only.

    Returns:
        PEFT's wrapper of the model.

    Raises:
        RGTGError: nothing would be trained, or the vocabulary head has another name.
    """
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise RGTGError(f"LoRA needs peft: {EXTRA}, or train the full model") from error
    name, layers = decoder_layers(model)
    if head is None and fork_layer == len(layers):
        raise RGTGError(
            f"fork_layer={fork_layer} leaves no layer to adapt and this objective trains no head: use fork_layer <= "
            f"{fork_layer - 1}"
        )
    if head is not None:
        # The head is float32 even over a bfloat16 trunk: its updates are smaller than bfloat16 resolves.
        _trained_head(model, head).to(torch.promote_types(model.dtype, torch.float32))
    if fork_layer == len(layers):
        return _head_alone(model, name, layers, head)
    return get_peft_model(model, lora_config(model, fork_layer, lora, head))


def lora_config(model: nn.Module, fork_layer: int, lora: Lora, head: str | None) -> Any:
    """PEFT's configuration of LoRA; the arguments are those of `add_adapters`."""
    from peft import LoraConfig, TaskType

    name, layers = decoder_layers(model)
    return LoraConfig(
        task_type=TaskType.SEQ_CLS if head == HEAD else TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=sorted({path.rpartition(".")[2] for path in _linear(layers[fork_layer:])}),
        layers_to_transform=list(range(fork_layer, len(layers))),
        layers_pattern=name,
        modules_to_save=None if head is None else [head],
    )


def _trained_head(model: PreTrainedModel, head: str) -> nn.Module:
    if head == HEAD:
        return _head(model)
    name, module = vocabulary_head(model)
    if name != head:
        raise RGTGError(
            f"{type(model).__name__} calls its vocabulary head {name} and adapters are served with one called {head}: "
            "train the full model"
        )
    return module


def _linear(layers: nn.Module) -> list[str]:
    """Paths of the linear layers inside."""
    return [path for path, module in layers.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


def _head_alone(model: PreTrainedModel, name: str, layers: nn.ModuleList, head: str | None) -> Any:
    """Trains the head only. PEFT needs at least one adapter: a frozen one of rank 1 that is 0."""
    from peft import LoraConfig, TaskType, get_peft_model

    last = len(layers) - 1
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if head == HEAD else TaskType.CAUSAL_LM,
        r=1,
        target_modules=[_linear(layers[last])[0].rpartition(".")[2]],
        layers_to_transform=[last],
        layers_pattern=name,
        modules_to_save=[str(head)],
    )
    wrapped = get_peft_model(model, config)
    for parameter_name, parameter in wrapped.named_parameters():
        if "lora_" in parameter_name:
            parameter.requires_grad_(False)
    return wrapped


def let_autocast_cast(model: nn.Module) -> None:
    """Saves two copies per adapter: PEFT casts its inputs to float32, and autocast casts them back.

    Only for models that always run under autocast. A frozen adapter may be in a layer below the fork, which also runs
    without autocast, and keeps its cast.
    """
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        if any(parameter.requires_grad for parameter in layer.parameters()):
            layer.cast_input_dtype_enabled = False


def drop_zero_adapters(folder: Path) -> None:
    """Removes the zero adapter of a model whose head alone was trained; PEFT fills in zeros when it loads the head."""
    path = folder / "adapter_model.safetensors"
    if path.is_file():
        tensors = load_file(path)
        kept = {name: tensor for name, tensor in tensors.items() if "lora_" not in name}
        save_file(kept, path, metadata={"format": "pt"})


def use_packed_forward(model: nn.Module) -> None:
    """Makes the model's forward accept a packed batch: `model(batch=…, trunk_states=…, read=…).logits` are rewards [M].

    The rewards are computed inside the model's own forward, so that wrappers (DistributedDataParallel, FSDP, autocast,
    PEFT) work as usual. Calls without `batch` are unchanged.
    """
    inner = pretrained(model)
    use_packed_attention(inner)
    inner.forward = MethodType(_packed_forward, inner)


def _packed_forward(
    self: PreTrainedModel,
    *args: Any,
    batch: PackedBatch | None = None,
    trunk_states: torch.Tensor | None = None,
    read: Reader | None = None,
    **kwargs: Any,
) -> Any:
    if batch is None:
        return type(self).forward(self, *args, **kwargs)
    stored = {} if trunk_states is None else {"trunk_states": trunk_states}
    trunk: Any = self.base_model
    hidden = trunk(input_ids=batch.input_ids, **forward_arguments(trunk, batch), **stored).last_hidden_state
    return SequenceClassifierOutputWithPast(logits=(read or read_scores)(self, hidden, batch))


def read_scores(model: PreTrainedModel, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """The score head's rewards [M] after each answer token, in the order of `answer_positions`."""
    rows, columns, _ = answer_positions(batch)
    head: Any = dict(model.named_children())[HEAD]
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden[rows, columns].to(head.weight.dtype))[:, 0]


def read_states(model: PreTrainedModel, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """The states [M, E] of the answer tokens, the score head's input."""
    rows, columns, _ = answer_positions(batch)
    return hidden[rows, columns]


def merge(folder: str | os.PathLike[str], output: str | os.PathLike[str]) -> Path:
    """Writes a trained model with its adapters merged into the weights, a model folder for any loader.

    Args:
        folder: folder of the adapters, as training saves them.
        output: new folder of the whole model; it is written atomically.

    Returns:
        The new folder.

    Raises:
        RGTGError: there are no adapters, their base cannot be loaded, or `output` cannot be written.
    """
    source, target = Path(folder), Path(output)
    if not (source / "adapter_config.json").is_file():
        raise RGTGError(f"{source} has no adapter_config.json: name a folder that LoRA training has saved")
    if target.exists():
        raise RGTGError(f"{target} exists: name another folder for the merged model")
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise RGTGError(f"merging adapters needs peft: {EXTRA}") from error
    config = PeftConfig.from_pretrained(str(source))
    base = config.base_model_name_or_path
    if base is None:
        raise RGTGError(f"{source}/adapter_config.json names no base model: add base_model_name_or_path")
    if config.task_type == "CAUSAL_LM":
        # A saved head replaces the base's, which may be tied to the embeddings.
        own_head = VOCABULARY_HEAD in (getattr(config, "modules_to_save", None) or [])
        model, _ = load_causal(base, new_head=own_head)
    else:
        model, _ = load_base(base)
    adapted: Any = PeftModel.from_pretrained(model, str(source))
    _check_adapter(adapted, source)
    merged = adapted.merge_and_unload()
    tokenizer = read_tokenizer(source, "adapter")
    partial = target.with_name(f".{target.name}.partial")
    try:
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        publish(partial, target)
    except (OSError, safetensors.SafetensorError) as error:
        raise RGTGError(f"cannot write {target}: {reason(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _check_adapter(adapted: Any, folder: Path) -> None:
    """Refuses an adapter's file with other names than its model: PEFT ignores them or fills in random weights."""
    from peft import get_peft_model_state_dict

    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        return
    held = set(safetensors_header(path))
    own = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if not any("lora_" in name for name in held):
        own = {name for name in own if "lora_" not in name}  # a head alone (`drop_zero_adapters`)
    if own != held:
        found = f"{names(held - own)} not in the model" if held - own else f"{names(own - held)} missing"
        raise RGTGError(f"the adapter {str(folder)!r} does not fit its base ({found}): save it again")


def trained_parameters(model: nn.Module) -> Sequence[tuple[str, nn.Parameter]]:
    """The parameters that training changes, by name."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
