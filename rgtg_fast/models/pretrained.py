"""The one door through which models, configurations and tokenizers come in from folders and the hub.

transformers fills weights that the files lack with random numbers, ignores those that it has no place for, asks on
stdin whether a folder's code may run, and raises errors of a dozen kinds. Here a model is either what its files say, or
it is refused in one line. Code that comes with a model never runs.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rgtg_fast import bundled
from rgtg_fast.errors import RGTGError
from rgtg_fast.models.checkpoint import Tensors, check_model, check_tokenizer
from rgtg_fast.models.keys import Difference
from rgtg_fast.models.memory import free_bytes, is_out_of_memory, too_large

# What libraries print to a terminal in bold or in colour.
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[a-zA-Z]|[\x00-\x08\x0e-\x1f\x7f]")

Source = str | os.PathLike[str]


def read_pretrained(
    kind: Any,
    source: Source,
    role: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    configure: Callable[[Any], None] = lambda config: None,
    new_head: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """A model with exactly the weights that its files hold, and its tokenizer.

    Args:
        kind: transformers' class to load it with, such as `AutoModelForCausalLM`.
        source: folder or hub id. role: what it is to be, for messages: "language model".
        device: where it will go; it is loaded to the CPU.
        configure: may refuse or change the configuration.
        new_head: the head will be trained anew, so that the files need not hold it.

    Returns:
        The model, its tokenizer, and whether the files hold no head.

    Raises:
        RGTGError: nothing there, files that cannot be read, names or shapes that are not the model's, or weights that
            do not fit the memory.
    """
    path = _local(source, role)
    with _named(source, role):
        held = Tensors() if path is None else check_model(path)
    title = f"{role} {str(source)!r}"
    with _one_line(source, role):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        configure(config)
        if config._attn_implementation not in (None, "eager", "sdpa"):
            # Others are packages of their own, or code from the hub.
            config._attn_implementation = None
    tokenizer = read_tokenizer(source, role)
    _check_room(title, held.parameters, dtype, torch.device(device))
    with _one_line(source, role, held.parameters, dtype):
        # Shapes that differ are refused below, by name.
        model, info = kind.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise RGTGError(f"{title} is an adapter on the hub: download it and name its folder")
    quantised: Any = getattr(model.config, "quantization_config", None)
    if quantised is not None and getattr(model, "hf_quantizer", None) is None:
        raise RGTGError(
            f"{title} is quantised by a method that transformers does not know: name an unquantised model"
        )
    difference, headless = Difference.of(model, info), False
    if new_head:
        difference, headless = difference.without_new_head(model)
    difference.refuse(model, source, role)
    return model, tokenizer, headless


def read_tokenizer(source: Source, role: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id.

    Raises:
        RGTGError: none there, or one that cannot be read.
    """
    path = _local(source, role)
    if path is not None:
        with _named(source, role):
            check_tokenizer(path)
    with _one_line(source, f"tokenizer of {role}"):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


@contextlib.contextmanager
def fits_in_memory(title: str, parameters: int | None, dtype: torch.dtype) -> Iterator[None]:
    """Turns an error of any library that says that memory ran out into one line."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RGTGError(too_large(title, parameters, dtype)) from error


def _check_room(title: str, parameters: int | None, dtype: torch.dtype, device: torch.device) -> None:
    """Refuses weights that cannot fit before any of them is read: a system that runs out ends the process."""
    free = free_bytes(device) if device.type in ("cpu", "cuda") else None
    if parameters is not None and free is not None and parameters * dtype.itemsize > free:
        raise RGTGError(too_large(title, parameters, dtype, free))


def _local(source: Source, role: str) -> Path | None:
    """The path where there is one, None for what may be on the hub."""
    if not isinstance(source, (str, os.PathLike)) or not str(source).strip():
        raise RGTGError(f"{role} {source!r} is no name: use a path, a hub id or a (model, tokenizer) pair")
    if str(source).startswith(bundled.PREFIX):
        bundled.resolve(str(source))  # an unknown name is refused as such
        raise RGTGError(
            f"{str(source)!r} cannot serve as {role}: {bundled.BELONGS}; name it alone as the reward"
        )
    path = Path(source)
    try:
        return path if path.exists() else None
    except (OSError, ValueError) as error:  # too long a name, or one with a zero byte
        raise RGTGError(f"{role} {str(source)[:80]!r} is no path: check the name") from error


@contextlib.contextmanager
def _named(source: Source, role: str) -> Iterator[None]:
    """Puts the model's role and name before what `checkpoint` says of its files."""
    try:
        yield
    except RGTGError as error:
        raise RGTGError(
            f"{role} {str(source)!r} is not a folder that transformers can load: {error}"
        ) from error
    except OSError as error:
        raise RGTGError(
            f"{role} {str(source)!r} cannot be read ({error.strerror or error}): check it"
        ) from error


@contextlib.contextmanager
def _one_line(
    source: Source, role: str, parameters: int | None = None, dtype: torch.dtype = torch.float32
) -> Iterator[None]:
    """Turns the loaders' errors into one line."""
    title = f"{role} {str(source)!r}"
    try:
        with fits_in_memory(title, parameters, dtype):
            yield
    except (RGTGError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers' Rust code panics with a BaseException
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise RGTGError(f"{title} {_why(source, error)}") from error


def _why(source: Source, error: BaseException) -> str:
    """What a loader's error means, and the way out."""
    path, text = Path(source), " ".join(_ESCAPES.sub("", str(error)).split())
    detail = f"({text[:160]})" if text else f"({type(error).__name__})"
    if not path.exists():
        if len(path.parts) > 2 or path.is_absolute():
            return "does not exist: check the path"
        if isinstance(error, OSError):
            return f"is neither a local folder nor to be had from the hub: check the name {detail}"
    if "trust_remote_code" in text or "custom code" in text:
        return "needs code of its own (auto_map), which is never run: name a model of a family that transformers has"
    if isinstance(error, ImportError):
        return f"needs a package that is missing: name a model without it (an unquantised one) or install it {detail}"
    if type(error).__name__ == "UnpicklingError" or "PytorchStreamReader" in text:
        return (
            "has a pickled checkpoint that is damaged or holds more than tensors, which would run code: save it as "
            f"safetensors {detail}"
        )
    if "does not recognize this architecture" in text or "Unrecognized configuration class" in text:
        return f"is of a family that cannot serve here: name a model of another {detail}"
    return f"is not a folder that transformers can load: check its files {detail}"
