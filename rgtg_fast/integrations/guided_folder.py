"""Guided folders: a base model and its reward model in one folder that transformers decodes guided.

    FOLDER/                       the base model: weights, configuration, tokenizer, generation config
        guidance.json             reward, guidance and the version that wrote them
        reward/                   the reward model, where the reward has one; `reward2/` for a second
        custom_generate/          what transformers runs in place of its generate(), with trust_remote_code=True
        README.md                 the model card

`export_folder` writes one; `generate` is what its `custom_generate/generate.py` runs.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import StoppingCriteriaList, StopStringCriteria

import rgtg_fast
from rgtg_fast import bundled
from rgtg_fast.config import Guidance
from rgtg_fast.decoder import RewardGuidedDecoder
from rgtg_fast.engine.request import check_guidance
from rgtg_fast.errors import RGTGError, one_line, shown
from rgtg_fast.files import publish, reason
from rgtg_fast.integrations.transformers import custom_generate
from rgtg_fast.models.adapter import Adapter, is_adapter
from rgtg_fast.rewards.base import Reward
from rgtg_fast.rewards.parse import CONTRASTIVE, PREFIXES, named_guide

SETTINGS = "guidance.json"
# Stands for the guided folder in the name of its reward.
_HERE = "{folder}"
_CODE = '''"""Reward-guided generation: a reward scores the candidates for every token (settings: guidance.json)."""

from rgtg_fast.integrations.guided_folder import generate as generate
'''
# Files of a model's folder that belong to the model.
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py", "LICENSE*", "NOTICE*")
_WEIGHTS = ("*.bin",)  # where there are no safetensors
# Settings of a generation config that guided decoding refuses, and what switches them off.
_UNGUIDED = {
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "guidance_scale": None,
    "cache_implementation": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "num_beams": 1,
    "remove_invalid_values": False,
    "watermarking_config": None,
}


# ---- decoding --------------------------------------------------------------------------------------------------------


def generate(*arguments: Any, model: PreTrainedModel, **settings: Any) -> Any:
    """transformers' generate() for a guided folder; it takes what `model.generate` takes.

    The reward and the guidance are those of the folder that `custom_generate=FOLDER` names, else of the one that the
    model was loaded from. `guidance=Guidance(...)` and `seed=...` replace the folder's for one call.

    Args:
        arguments: of generate(), by position.
        model: the base model.
        settings: of generate(), by name.

    Raises:
        RGTGError: no settings or reward model in the folder, settings of a newer version, or an argument that guided
            decoding refuses.
    """
    unguided: Any = type(model).generate  # pyright: ignore[reportAttributeAccessIssue]
    if settings.get("custom_generate") is not None:
        return unguided(model, *arguments, **settings)
    guidance, reward = read_settings(_folder_of(model))
    config = settings.get("generation_config")
    if "paged" in (settings.get("cache_implementation"), getattr(config, "cache_implementation", None)):
        raise RGTGError("cache_implementation='paged' decodes without the reward: leave it out")
    given, seed, streamer = (settings.pop(name, None) for name in ("guidance", "seed", "streamer"))
    settings = _with_stop_strings(model, settings)

    def guided(model: Any, input_ids: Any, **prepared: Any) -> Any:
        return custom_generate(
            model,
            input_ids,
            reward=reward,
            guidance=guidance if given is None else given,
            seed=seed,
            streamer=streamer,
            **prepared,
        )

    return unguided(model, *arguments, custom_generate=guided, **settings)


def _folder_of(model: PreTrainedModel) -> Path:
    """The guided folder of a call: transformers does not pass on which one it has the code from."""
    frame = sys._getframe(2)
    called = frame.f_code.co_name, frame.f_globals.get("__name__")
    name = frame.f_locals.get("custom_generate")
    if called == ("generate", "transformers.generation.utils") and isinstance(name, str):
        return _local(name, None)
    return _local(model.config._name_or_path, getattr(model.config, "_commit_hash", None))


def _with_stop_strings(model: PreTrainedModel, settings: dict[str, Any]) -> dict[str, Any]:
    """Stop strings as a stopping criterion: generate() would not find the tokenizer that they come with."""
    tokenizer = settings.pop("tokenizer", None)
    config = settings.get("generation_config")
    places = (
        settings.get("stop_strings"),
        *(getattr(each, "stop_strings", None) for each in (config, model.generation_config)),
    )
    stops = next((each for each in places if each), None)
    if stops is None or tokenizer is None:
        return settings
    criteria = [*(settings.get("stopping_criteria") or ()), StopStringCriteria(tokenizer, stops)]
    return {**settings, "stop_strings": None, "stopping_criteria": StoppingCriteriaList(criteria)}


def read_settings(folder: Path) -> tuple[Guidance, Reward | None]:
    """The guidance and the reward of a guided folder.

    Raises:
        RGTGError: no settings, settings that cannot be read or that a newer version wrote, or no reward model.
    """
    path = folder / SETTINGS
    try:
        text = path.read_text(encoding="utf-8")
        given = json.loads(text)
    except FileNotFoundError as error:
        raise RGTGError(
            f"{folder} is no guided folder: it has no {SETTINGS}; make one with rgtg-fast export"
        ) from error
    except (OSError, ValueError) as error:
        raise RGTGError(f"cannot read {path} ({one_line(error)}): export the folder again") from error
    if not isinstance(given, dict):
        raise RGTGError(f"{path} holds {shown(given)}: export the folder again")
    _check_version(str(given.pop("rgtg_fast", "")), folder)
    names = {f.name for f in fields(Guidance)} - {"temperature"}
    known = names | {"reward", "label", "trust_remote_code", "weights_dtype"}
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        raise RGTGError(f"{path} has an unknown setting {unknown!r}: use one of {', '.join(sorted(known))}")
    try:
        guidance = Guidance(**{name: given[name] for name in names & given.keys()})
        reward = _reward(given, folder)
    except RGTGError as error:
        raise RGTGError(f"{path}: {error}") from error
    if reward is not None:
        vars(reward)["_made_from"] = str(folder.resolve()), text
    return guidance, reward


def _reward(given: dict[str, Any], folder: Path) -> Reward | None:
    name = given.get("reward")
    if name is None:
        raise RGTGError("it names no reward")
    if not isinstance(name, str):
        raise RGTGError(f"reward={shown(name)} is not a name: use for example '{_HERE}/reward'")
    for part in re.findall(r"\{folder\}/([\w.-]+)", name):
        if not (folder / part).is_dir():
            raise RGTGError(
                f"the reward model's folder {folder / part} is missing: copy it there or export again"
            )
    trusted = given.get("trust_remote_code", False)
    if not isinstance(trusted, bool):
        raise RGTGError(f"trust_remote_code={shown(trusted)} is neither true nor false")
    return named_guide(
        name.replace(_HERE, str(folder)), given.get("label"), trusted, given.get("weights_dtype")
    )


def _check_version(written: str, folder: Path) -> None:
    """Refuses settings of a newer version, whose meaning is not known."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", written)
    own = re.match(r"(\d+)\.(\d+)\.(\d+)", rgtg_fast.__version__)
    assert own is not None
    if numbers is None:
        raise RGTGError(
            f"{folder / SETTINGS} does not say which version of rgtg_fast wrote it: export the folder again"
        )
    if tuple(map(int, numbers.groups())) > tuple(map(int, own.groups())):
        raise RGTGError(
            f"{folder} was exported by rgtg_fast {written} and this is {rgtg_fast.__version__}: upgrade rgtg-fast, or "
            "export the folder again"
        )


def _local(name: str, revision: str | None) -> Path:
    """The folder itself, or that of a hub repository's settings and reward models in the cache."""
    if not name:
        raise RGTGError("this model came from no folder: pass custom_generate=FOLDER")
    if Path(name).is_dir():
        return Path(name)
    return _downloaded(name, [SETTINGS, "reward*/*"], revision)


# ---- exporting -------------------------------------------------------------------------------------------------------


def export_folder(
    decoder: RewardGuidedDecoder,
    lm: str | os.PathLike[str],
    reward: str,
    output: str | os.PathLike[str],
    guidance: Guidance = Guidance(),
    label: str | int | None = None,
    weights: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Writes a guided folder, completely or not at all.

    Args:
        decoder: of the two models, which shows that they fit.
        lm: path or hub id of the base model.
        reward: name of the reward, as in `RewardGuidedDecoder.from_pretrained`.
        output: the folder, which must not exist.
        guidance: of every call; the temperature goes to the generation config.
        label: as in `SequenceReward`.
        weights: as in `SequenceReward`.
        trust_remote_code: whether the reward model's own code may run.
        overwrite: whether an older guided folder is replaced.

    Returns:
        Settings of the base model's generation config that guided decoding has no part for, and that were left out.

    Raises:
        RGTGError: a folder that may not be replaced, a model that would not be in the folder, or a write that fails.
    """
    target = Path(output)
    check_target(target, overwrite, lm, reward)
    check_guidance(guidance, decoder.lm, decoder._scheduler.reward)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        _write_base(decoder, lm, partial)
        dropped = _write_generation_config(decoder, guidance, partial)
        own = _Copies(decoder, partial)
        given = asdict(guidance)
        given.pop("temperature")
        stored = {"rgtg_fast": rgtg_fast.__version__, "reward": _renamed(reward, own), **given}
        stored |= {"label": label, "weights_dtype": weights, "trust_remote_code": trust_remote_code or None}
        text = json.dumps({name: value for name, value in stored.items() if value is not None}, indent=2)
        (partial / SETTINGS).write_text(text + "\n", encoding="utf-8")
        code = partial / "custom_generate"
        code.mkdir(exist_ok=True)
        (code / "generate.py").write_text(_CODE, encoding="utf-8")
        requirements = f"rgtg-fast>={rgtg_fast.__version__}\n"
        (code / "requirements.txt").write_text(requirements, encoding="utf-8")
        (partial / "README.md").write_text(_card(decoder, lm, reward, text), encoding="utf-8")
        publish(partial, target)
    except OSError as error:
        raise RGTGError(f"cannot write {target}: {reason(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return dropped


def check_target(
    target: Path, overwrite: bool, lm: str | os.PathLike[str] | None, reward: str | None
) -> None:
    """Refuses a folder that an export may not write, before models are loaded.

    Raises:
        RGTGError: a file, a folder that is no guided folder, one without `overwrite`, or that of a model that is read.
    """
    try:
        if target.is_symlink():
            raise RGTGError(f"{target} is a symbolic link, which is not replaced: name a folder")
        if target.is_file():
            raise RGTGError(f"cannot write {target}: it is a file, name a folder")
        if not target.exists():
            return
        if not overwrite:
            raise RGTGError(f"{target} exists: name another folder, or replace it with --overwrite")
        if any(target.iterdir()) and not (target / SETTINGS).is_file():
            raise RGTGError(f"{target} is not a guided folder and is not replaced: name another folder")
        inside = target.resolve()
        for name in (name.strip() for name in [str(lm or ""), *re.split(r"[:,*+]", reward or "")]):
            if name and Path(name).exists() and Path(name).resolve().is_relative_to(inside):
                raise RGTGError(f"{target} holds the model that is read ({name}): name another folder")
    except (OSError, ValueError) as error:
        if isinstance(error, RGTGError):
            raise
        raise RGTGError(f"cannot write {target}: {reason(error)}") from error


class _Copies:
    """Copies reward models into the folder, and gives their names there.

    Args:
        decoder: of the base model.
        folder: the new folder.
    """

    def __init__(self, decoder: RewardGuidedDecoder, folder: Path):
        self._lm, self._folder = decoder.lm.runner.model, folder
        self._count = 0

    def __call__(self, name: str) -> str:
        """The name of a reward model in the folder.

        Raises:
            RGTGError: a file, or an adapter of another base, which the folder would not hold.
        """
        source = _model_folder(name, "reward model")
        if source is None:
            raise RGTGError(f"reward model {name!r} is a single file: save it as a folder first")
        if is_adapter(source) and (wrong := Adapter.load(source).base_mismatch(self._lm)) is not None:
            raise RGTGError(
                f"{name} is an adapter of another base model than the folder's ({wrong}): export a merged reward model"
            )
        self._count += 1
        own = "reward" if self._count == 1 else f"reward{self._count}"
        _copy_model(source, self._folder / own)
        return f"{_HERE}/{own}"


def _renamed(reward: str, copy: Callable[[str], str]) -> str:
    """The reward's name with each model's place in the guided folder."""
    if reward == CONTRASTIVE:
        return reward
    prefix, colon, rest = reward.partition(":")
    if not colon or prefix not in PREFIXES:
        return copy(reward)
    if prefix == "mixture":
        terms = re.split(r"\+(?=\s*[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?\s*\*)", rest)
        pairs = [term.partition("*") for term in terms]
        return "mixture:" + "+".join(
            f"{weight.strip()}*{_renamed(name.strip(), copy)}" for weight, _, name in pairs
        )
    return f"{prefix}:" + ",".join(
        copy(path.strip()) for path in (rest.split(",") if prefix == "eft" else [rest])
    )


def _model_folder(name: str | os.PathLike[str], role: str) -> Path | None:
    """The folder with a model's files, in the cache for a hub id; None for a single file."""
    text = bundled.resolve(str(name))
    path = Path(text)
    if path.is_dir():
        return path
    return None if path.is_file() else _downloaded(text, [*_MODEL_FILES, *_WEIGHTS], None, role)


def _downloaded(name: str, patterns: list[str], revision: str | None, role: str = "guided folder") -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # of the hub's client: many kinds
        raise RGTGError(
            f"{role} {name!r} is no folder and not on the hub ({one_line(error, 120)})"
        ) from error


def _copy_model(source: Path, target: Path) -> None:
    """Copies a model's files; weights in an older format only where there are no safetensors."""
    target.mkdir(exist_ok=True)
    found = [path for pattern in _MODEL_FILES for path in source.glob(pattern)]
    if not any(path.suffix == ".safetensors" for path in found):
        found += [path for pattern in _WEIGHTS for path in source.glob(pattern)]
    for path in found:
        if path.is_file() and path.name != SETTINGS:
            shutil.copyfile(path, target / path.name)


def _write_base(decoder: RewardGuidedDecoder, lm: str | os.PathLike[str], folder: Path) -> None:
    """The base model's files as they are, or what was loaded of an adapter or a single file."""
    source = _model_folder(lm, "language model")
    if source is not None and not is_adapter(source):
        _copy_model(source, folder)
        return
    decoder.lm.runner.model.save_pretrained(folder)
    if decoder.tokenizer is not None:
        decoder.tokenizer.save_pretrained(folder)


def _write_generation_config(decoder: RewardGuidedDecoder, guidance: Guidance, folder: Path) -> list[str]:
    """The base model's generation config with the guidance's temperature, without what would be refused."""
    config: Any = copy.deepcopy(decoder.lm.runner.model.generation_config) or GenerationConfig()
    dropped = []
    for name, neutral in _UNGUIDED.items():
        value = getattr(config, name, None)
        if value is not None and value != neutral:
            dropped.append(f"{name}={shown(value)}")
            setattr(config, name, neutral)
    config.do_sample = guidance.temperature > 0
    config.temperature = guidance.temperature if config.do_sample else None
    config.top_k = 0 if config.do_sample else None
    config._from_model_config = False
    try:
        config.save_pretrained(folder)
    except ValueError as error:
        raise RGTGError(
            f"the language model's generation config cannot be saved ({one_line(error)}): correct it"
        ) from error
    return dropped


def _card(decoder: RewardGuidedDecoder, lm: str | os.PathLike[str], reward: str, settings: str) -> str:
    """The model card, which names no folder of this machine; the hub finds it by its tag `custom_generate`."""
    reward = re.sub(r"[^:*+,]*/", "", reward)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- custom_generate
- rgtg-fast
- reward-guided
---

# {Path(str(lm)).name}, guided by {reward}

The base model's weights are unchanged. A reward scores the candidates for every token while the model decodes:
`pip install rgtg-fast`, then

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/or/id of this folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("How do I learn to swim?", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

Without `trust_remote_code=True` the model decodes unguided, as the base model does.

Settings (`{SETTINGS}`):

```json
{settings}
```
"""


def with_own_temperature(guidance: Guidance, decoder: RewardGuidedDecoder) -> Guidance:
    """The guidance with the temperature of the base model's generation config."""
    config: Any = decoder.lm.runner.model.generation_config
    if config is None or not config.do_sample:
        return replace(guidance, temperature=0)
    return replace(guidance, temperature=1.0 if config.temperature is None else config.temperature)
