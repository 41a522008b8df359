"""Folds a reward that is linear in the base model's own states into the base model's head.

For such a reward, log π + β·r over the whole vocabulary is the output of one linear head, up to a constant per row that
the softmax ignores. An ordinary checkpoint holds it, and any engine serves it at the base model's cost.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import safetensors
import torch
from transformers import PreTrainedModel

from rgtg_fast.config import Guidance
from rgtg_fast.decoder import RewardGuidedDecoder
from rgtg_fast.errors import RGTGError, one_line
from rgtg_fast.files import publish, reason
from rgtg_fast.models.adapter import is_adapter
from rgtg_fast.models.device import resolve_dtype
from rgtg_fast.models.gguf import gguf_file
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.loading import ModelAndTokenizer
from rgtg_fast.models.pretrained import read_description
from rgtg_fast.models.quantized import refuse_quantized
from rgtg_fast.rewards.base import Reward
from rgtg_fast.rewards.compatibility import other_prompts
from rgtg_fast.rewards.mixture import MixtureReward
from rgtg_fast.rewards.parse import RewardLike
from rgtg_fast.rewards.runtime import SharedForward
from rgtg_fast.rewards.vocabulary import (
    AutoregressiveReward,
    CausalScorer,
    LogRatioReward,
    VocabularyReward,
)

# Entries of a configuration that change no state of the trunk.
_NEUTRAL = frozenset(
    {"architectures", "_name_or_path", "tie_word_embeddings", "dtype", "transformers_version", "use_cache"}
    | {"bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type"}
)
_INSTEAD = "use RewardGuidedDecoder, or RewardGuide in vLLM"


def export_folded(
    lm: str | os.PathLike[str] | ModelAndTokenizer,
    reward: RewardLike,
    beta: float,
    output: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a checkpoint whose head is W + β·W_r: the base model guided by the reward, for any engine.

    Its softmax equals that of `Guidance(beta=beta, support="all")`. The reward must be linear in the base model's own
    final states: a `VocabularyReward` whose head alone was trained, such an `AutoregressiveReward` or `LogRatioReward`
    (their log-sum-exp is one constant per row, which the softmax ignores), or a mixture of them.

    Args:
        lm: as in `RewardGuidedDecoder.from_pretrained`.
        reward: as in `RewardGuidedDecoder.from_pretrained`: `"farma:PATH"`, a reward object.
        beta: weight β of the reward.
        output: folder to write. It appears complete or not at all.
        dtype: dtype of the weights written. None: that of the base model's files, float32 for an adapter or a GGUF
            file. The sum is computed in float32 and rounded once.
        overwrite: whether an existing checkpoint at `output` is replaced.

    Returns:
        The path of the folder.

    Raises:
        RGTGError: a reward that is not linear in the base model's states, a base model that caps its logits or is
            quantized, other vocabularies, a bias where the base model's head has none, or a folder that exists or
            cannot be written.

    Example:
        >>> export_folded("lm", "farma:reward", beta=1.8, output="folded")  # doctest: +SKIP
        >>> # vllm serve folded
    """
    target = _free_target(Path(output), overwrite, lm, reward)
    beta = Guidance(beta=beta, support="all").beta
    loaded = isinstance(lm, (tuple, list))
    decoder = RewardGuidedDecoder.from_pretrained(
        lm,
        reward,
        device=None if loaded else "cpu",
        dtype=None if loaded else torch.float32,
        fuse_projections=False,
    )
    model: Any = decoder.lm.runner.model
    refuse_quantized(model, "have a reward folded into their head")
    weight, bias = linear_reward(decoder)
    state = _folded_state(model, decoder.lm.runner.head, weight * beta, bias * beta)
    kind = _stored_dtype(lm, model) if dtype is None else resolve_dtype(dtype, torch.device("cpu"))
    state = _rounded(state, model, kind)
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise RGTGError(
            f"folded weights are beyond the range of {kind}: pass dtype='float32', or a smaller beta"
        )
    _write(target, model, decoder.lm.tokenizer, state, kind)
    return target


# ---- what is linear --------------------------------------------------------------------------------------------------


def linear_reward(decoder: RewardGuidedDecoder) -> tuple[torch.Tensor, torch.Tensor]:
    """W_r [V, E] and b_r [V] of a reward r(v) = W_r[v]·h + b_r[v] + a constant of the row.

    Args:
        decoder: a base model, whose final states are h, and the reward.

    Returns:
        Both in at least float32.

    Raises:
        RGTGError: no reward, one that is not of this form or has weights that are NaN; a base model that caps its
            logits.
    """
    lm = decoder.lm
    if decoder.reward is None:
        raise RGTGError("there is no reward: name one, such as 'farma:PATH'")
    head: Any = lm.runner.head
    cap = lm.runner.logit_softcap
    if cap is not None:
        raise RGTGError(
            f"{lm.runner.name} caps its logits ({cap:g}·tanh(head / {cap:g})), which is not linear in its states: "
            f"{_INSTEAD}"
        )
    if lm.vocabulary != head.out_features:
        raise RGTGError(
            f"only {lm.vocabulary} of the {head.out_features} tokens of {lm.runner.name} have a reward and an "
            f"embedding, and a folded head cannot leave tokens out: {_INSTEAD}"
        )
    weight = torch.zeros_like(head.weight, dtype=torch.promote_types(head.weight.dtype, torch.float32))
    bias = weight.new_zeros(len(weight))
    for factor, scorer in _terms(decoder.reward):
        _check_own_states(lm, scorer)
        own: Any = scorer.runtime.head
        weight += own.weight[: lm.vocabulary].to(weight) * factor
        if own.bias is not None:
            bias += own.bias[: lm.vocabulary].to(bias) * factor
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise RGTGError(
            f"the head of {decoder.reward.name} has weights that are NaN or infinite: check its files"
        )
    return weight, bias


def _terms(reward: Reward) -> list[tuple[float, CausalScorer]]:
    """The heads of a reward with their factors: r(v) = Σ factor·head(h)[v] + a constant of the row.

    Raises:
        RGTGError: a reward that is not such a sum.
    """
    # A subclass may compute anything else.
    if type(reward) is MixtureReward:
        parts = zip(reward.weights, reward.rewards, strict=True)
        return [(weight * factor, scorer) for weight, part in parts for factor, scorer in _terms(part)]
    if type(reward) in (VocabularyReward, AutoregressiveReward):
        return [(1.0, reward._scorers[0])]  # pyright: ignore[reportAttributeAccessIssue]
    if type(reward) is LogRatioReward:
        tuned, untuned = reward._scorers
        return [(1.0, tuned), (-1.0, untuned)]
    raise RGTGError(
        f"a {type(reward).__name__} is not linear in the base model's states and cannot be folded into its head: "
        f"{_INSTEAD}"
    )


def _check_own_states(lm: LanguageModel, scorer: CausalScorer) -> None:
    """Refuses a reward model that reads other states than the base model's own."""
    runtime = scorer.runtime
    if isinstance(runtime, SharedForward):
        difference = "changes layers below the head" if runtime._own_rows else None
    else:
        difference = other_prompts(lm.tokenizer, runtime.tokenizer, scorer.chat_template, runtime.name)
        difference = difference or _trunk_difference(lm.runner.model, runtime.runner.model)
    if difference is not None:
        raise RGTGError(
            f"{runtime.name} cannot be folded into the head of {lm.runner.name}: it {difference}; only a reward whose "
            f"head alone was trained can: {_INSTEAD}"
        )


def _trunk_difference(base: PreTrainedModel, other: PreTrainedModel) -> str | None:
    """In words, after "it": how another model's states differ from the base model's; None where they cannot."""
    ours, theirs = (_settings(model) for model in (base, other))
    changed = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if type(base) is not type(other) or changed:
        return f"is another architecture ({', '.join(changed) or type(other).__name__})"
    tensors = [
        {**dict(t.named_parameters()), **dict(t.named_buffers())} for t in (base.base_model, other.base_model)
    ]
    for name, tensor in tensors[0].items():
        its = tensors[1].get(name)
        if its is None or its.shape != tensor.shape or not torch.equal(its.to(tensor), tensor):
            return f"has other weights ({name})"
    return None


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config.get_text_config().to_dict()
    return {key: value for key, value in config.items() if key not in _NEUTRAL}


# ---- the folded checkpoint -------------------------------------------------------------------------------------------


def _folded_state(
    model: PreTrainedModel, head: Any, weight: torch.Tensor, bias: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The model's weights with the changed head, no longer tied to the embeddings; the model stays as it is."""
    state = dict(model.state_dict())
    name = next(name for name, module in model.named_modules() if module is head)
    state[f"{name}.weight"] = weight + head.weight
    if head.bias is not None:
        state[f"{name}.bias"] = bias + head.bias
    elif not torch.equal(
        bias, bias[:1].expand_as(bias)
    ):  # the softmax ignores what all tokens have in common
        raise RGTGError(
            f"the reward's head has a bias and {type(model).__name__} has no place for one: train the head without, or "
            f"{_INSTEAD}"
        )
    return state


def _stored_dtype(lm: str | os.PathLike[str] | ModelAndTokenizer, model: PreTrainedModel) -> torch.dtype:
    """The dtype of the base model's files, of a loaded model's weights."""
    if isinstance(lm, (tuple, list)):
        return model.dtype
    if is_adapter(lm) or gguf_file(lm, str(lm)) is not None:
        return torch.float32
    described, _ = read_description(lm, "language model")
    stored = described.config.get_text_config().dtype
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _rounded(
    state: dict[str, torch.Tensor], model: PreTrainedModel, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    # transformers loads these in float32 whatever the dtype.
    exact = [
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    ]
    return {
        name: tensor.to("cpu", dtype)
        if tensor.is_floating_point() and not any(part in name for part in exact)
        else tensor.cpu()
        for name, tensor in state.items()
    }


def _free_target(output: Path, overwrite: bool, lm: object, reward: object) -> Path:
    """The folder to write, checked before the work.

    Raises:
        RGTGError: it exists, holds something else than a checkpoint or is one that is read, or cannot be written.
    """
    try:
        exists, parent = os.path.lexists(output), output.absolute().parent
        if output.is_symlink():
            raise RGTGError(f"{output} is a symbolic link, which is not replaced: name a folder")
        if exists and not overwrite:
            raise RGTGError(
                f"{output} exists: name another folder, or replace it with overwrite=True (--overwrite)"
            )
        if exists and not (output / "config.json").is_file():
            raise RGTGError(f"{output} holds no checkpoint to overwrite: name another folder")
        named = reward.rpartition(":")[2] if isinstance(reward, str) else reward
        for source in (lm, named):
            if not (exists and source and isinstance(source, (str, os.PathLike))):
                continue
            if Path(source).exists() and Path(source).resolve().is_relative_to(output.resolve()):
                raise RGTGError(f"{output} holds the model that is read ({source}): name another folder")
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise RGTGError(f"cannot write {output}: {parent} is no folder that can be written to")
    except (OSError, ValueError) as error:
        if isinstance(error, RGTGError):
            raise
        raise RGTGError(f"cannot write {output}: {reason(error)}") from error
    return output


def _write(
    target: Path, model: Any, tokenizer: Any, state: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Writes weights, configurations, tokenizer and chat template; the folder is read back before it gets its name."""
    config = copy.deepcopy(model.config)
    for each in (config, config.get_text_config()):
        each.tie_word_embeddings, each.dtype = False, dtype
    config.architectures = [type(model).__name__]
    partial = None
    try:
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", dir=target.absolute().parent))
        partial.chmod(0o755)  # mkdtemp's is for the owner alone
        model.save_pretrained(partial, state_dict=dict(state))
        config.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        _check_written(partial, model, state, dtype)
        publish(partial, target)
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        if isinstance(error, RGTGError):
            raise
        raise RGTGError(f"cannot write {target}: {one_line(error)}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _check_written(
    folder: Path, model: PreTrainedModel, state: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Reads the checkpoint back and compares every weight.

    Raises:
        RGTGError: a family that ties its head whatever its configuration says.
    """
    found = type(model).from_pretrained(folder, dtype=dtype).state_dict()
    wrong = [name for name, tensor in state.items() if not torch.equal(found[name], tensor)]
    if wrong:
        raise RGTGError(
            f"{type(model).__name__} does not load the folded weights as they were written ({wrong[0]}): {_INSTEAD}"
        )
