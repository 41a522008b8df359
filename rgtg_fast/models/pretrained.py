"""Loads models, configurations and tokenizers from folders and the hub; nothing else calls transformers' loaders.

transformers initializes weights that the files lack at random, ignores those that the model lacks, asks on stdin
whether it may run a folder's code, and raises many kinds of errors. Here a model has exactly the weights of its files
or is refused in one line, and code that comes with a model runs only where the user trusts that model by name.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from rgtg_fast import bundled
from rgtg_fast.errors import RGTGError
from rgtg_fast.files import reason
from rgtg_fast.models.checkpoint import check_file, check_model, check_tokenizer, error_prefix
from rgtg_fast.models.device import fits_in_memory, free_bytes, too_large
from rgtg_fast.models.gguf import converted, gguf_file
from rgtg_fast.models.state_dict import StateDictMismatch
from rgtg_fast.models.tensor_parallel import loader_arguments

# Terminal escapes and control characters, which libraries put into their messages.
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[a-zA-Z]|[\x00-\x08\x0e-\x1f\x7f]")

Source = str | os.PathLike[str]
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
# While it builds a model, transformers changes what the whole process sees: torch's default dtype and initializers.
_LOADING = threading.RLock()


def _one_at_a_time(load: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Makes threads that load models wait for one another: they would load wrong weights, or miss some."""

    @wraps(load)
    def locked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with _LOADING:
            return load(*args, **kwargs)

    return locked


@_one_at_a_time
def read_pretrained(
    kind: Any,
    source: Source,
    role: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    configure: Callable[[Any], None] = lambda config: None,
    new_head: bool = False,
    trust_remote_code: bool = False,
    tp_plan: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """Loads a model with exactly the weights of its files, and its tokenizer.

    Args:
        kind: transformers' class to load it with, such as `AutoModelForCausalLM`.
        source: folder or hub id, or a GGUF file, which is converted into the cache.
        role: what it is used as, for messages: "language model".
        dtype: dtype of the weights; quantized models keep that of their files.
        device: where the model will run, for the check of free memory; it is loaded to the CPU.
        configure: called with the configuration, which it may change or refuse.
        new_head: whether the head will be trained anew, so that the files may lack it.
        trust_remote_code: whether code that comes with this model may run.
        tp_plan: "auto" spreads the weights over the processes of the run.

    Returns:
        The model, its tokenizer, and whether the files lack the head.

    Raises:
        RGTGError: nothing there, files that cannot be read, keys or shapes that are not the model's, or weights that
            do not fit the memory.
    """
    title, given = f"{role} {str(source)!r}", source
    path = _local_path(source, role)
    file = gguf_file(source, title)
    if file is not None:
        source = path = _converted(file, title, dtype)
        # What is wrong with the folder from here on, a new conversion mends.
        title = f"{title} (converted into {path}: delete that folder to convert it again)"
    parameters = None
    if path is not None:
        with _file_errors(title):
            parameters = check_model(path)
    with _loader_errors(title, source, trust_remote_code):
        if trust_remote_code:
            _check_code(source, title)
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        configure(config)
        if getattr(config, "quantization_config", None) is not None:
            # Kernels of quantized weights may have no other dtype than the one they were quantized for.
            dtype = config.dtype if isinstance(config.dtype, torch.dtype) else dtype
        if config._attn_implementation not in (None, "eager", "sdpa"):
            # Others need further packages, or code from the hub.
            config._attn_implementation = None
    # The tokenizer of a GGUF file is complete; AutoTokenizer would replace parts of it by those of its family.
    tokenizer_kind = AutoTokenizer if file is None else PreTrainedTokenizerFast
    tokenizer = read_tokenizer(source, role, tokenizer_kind, trust_remote_code)
    spread = loader_arguments(tp_plan, config, title)
    if not spread:
        _check_memory(title, parameters, dtype, torch.device(device))
    with _loader_errors(title, source, trust_remote_code), fits_in_memory(title, parameters, dtype):
        model, info = kind.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            # Shapes that differ are refused below, with the weight's name.
            ignore_mismatched_sizes=True,
            **spread,
        )
    _check_format(model, title)
    mismatch, headless = StateDictMismatch.of(model, info), False
    if new_head:
        mismatch, headless = mismatch.without_new_head(model)
    mismatch.refuse(model, given, role)
    if file is not None:
        model.config._name_or_path = str(given)
    return model, tokenizer, headless


@_one_at_a_time
def read_description(
    source: Source, role: str, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model without its weights, on the device "meta", and its tokenizer.

    Args:
        source: folder or hub id.
        role: what it is used as, for messages.
        trust_remote_code: whether code that comes with this model may run.

    Raises:
        RGTGError: nothing there, or files that cannot be read.
    """
    title = f"{role} {str(source)!r}"
    path = _local_path(source, role)
    if path is not None:
        with _file_errors(title):
            check_model(path)
    with _loader_errors(title, source, trust_remote_code):
        if trust_remote_code:
            _check_code(source, title)
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    with suppress(OSError):  # where it has none, that of its config stays
        model.generation_config = GenerationConfig.from_pretrained(source)
    model.config._name_or_path = str(source)
    return model, read_tokenizer(source, role, trust_remote_code=trust_remote_code)


def read_tokenizer(
    source: Source, role: str, kind: Any = AutoTokenizer, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a folder or hub id.

    Args:
        source: folder or hub id.
        role: what its model is used as, for messages.
        kind: transformers' class to load it with.
        trust_remote_code: whether code that comes with it may run.

    Raises:
        RGTGError: none there, or one that cannot be read.
    """
    path = _local_path(source, role)
    if path is not None:
        with _file_errors(f"{role} {str(source)!r}"):
            check_tokenizer(path)
    with _loader_errors(f"tokenizer of {role} {str(source)!r}", source, trust_remote_code):
        return kind.from_pretrained(source, trust_remote_code=trust_remote_code)


def _converted(file: Path, title: str, dtype: torch.dtype) -> Path:
    """The folder of a GGUF file's model in the cache."""
    with _file_errors(title):
        check_file(file)
    with fits_in_memory(title, None, dtype):
        return converted(file, title, dtype)


def _check_code(source: Source, title: str) -> None:
    """Refuses a trusted model whose code lies in another repository, which the user has not named."""
    maps = [PreTrainedConfig.get_config_dict(source)[0].get("auto_map")]
    maps.append(get_tokenizer_config(source, trust_remote_code=False).get("auto_map"))
    for reference in _references(maps):
        repository, separator, _ = reference.partition("--")
        if separator and repository != str(source):
            raise RGTGError(
                f"{title} runs code of another repository, {repository!r} (auto_map), which trust_remote_code does not "
                "cover: copy that code into the model's folder"
            )


def _references(value: Any) -> Iterator[str]:
    """The classes that an auto_map names, in nested lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _references(each)


def _check_memory(title: str, parameters: int | None, dtype: torch.dtype, device: torch.device) -> None:
    """Refuses weights that cannot fit before any is read: a system without memory may kill the process."""
    free = free_bytes(device) if device.type in ("cpu", "cuda") else None
    if parameters is not None and free is not None and parameters * dtype.itemsize > free:
        raise RGTGError(too_large(title, parameters, dtype, free))


def _check_format(model: PreTrainedModel, title: str) -> None:
    """Refuses an adapter on the hub, and a quantization that transformers has ignored."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise RGTGError(f"{title} is an adapter on the hub: download it and name its folder")
    quantized: Any = getattr(model.config, "quantization_config", None)
    if quantized is not None and getattr(model, "hf_quantizer", None) is None:
        raise RGTGError(
            f"{title} is quantized by a method that transformers does not know: name an unquantized model"
        )


def _local_path(source: Source, role: str) -> Path | None:
    """The path of a local folder or file; None for what may be on the hub."""
    if not isinstance(source, (str, os.PathLike)) or not str(source).strip():
        raise RGTGError(f"{role} {source!r} is not a name: use a path, a hub id or a (model, tokenizer) pair")
    if str(source).startswith(bundled.PREFIX):
        bundled.resolve(str(source))  # an unknown name is refused as such
        raise RGTGError(
            f"{str(source)!r} cannot serve as {role}: {bundled.BELONGS}; name it alone as the reward"
        )
    path = Path(source)
    try:
        return path if path.exists() else None
    except (OSError, ValueError) as error:  # too long a name, or one with a zero byte
        raise RGTGError(f"{role} {str(source)[:80]!r} is not a path: check the name") from error


@contextmanager
def _file_errors(title: str) -> Iterator[None]:
    """Puts the model's role and name before errors about its files."""
    try:
        with error_prefix(f"{title} is not a folder that transformers can load"):
            yield
    except OSError as error:
        raise RGTGError(f"{title} cannot be read ({reason(error)}): check it") from error


@contextmanager
def _loader_errors(title: str, source: Source, own_code: bool) -> Iterator[None]:
    """Replaces the errors of transformers' loaders with one line; what a model's own code prints goes to stderr."""
    printed = redirect_stdout(sys.stderr) if own_code else nullcontext()
    try:
        with printed, fits_in_memory(title, None, torch.float32):
            yield
    except (RGTGError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers' Rust code panics with a BaseException
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise RGTGError(f"{title} {_explain(source, error)}") from error


def _explain(source: Source, error: BaseException) -> str:
    """What a loader's error means, and what to do."""
    path, text = Path(source), " ".join(_ESCAPES.sub("", str(error)).split())
    detail = f"({text[:160] or type(error).__name__})"
    if not path.exists():
        if len(path.parts) > 2 or path.is_absolute():
            return "does not exist: check the path"
        if isinstance(error, OSError):
            return f"is neither a local folder nor a model that the hub provides: check the name {detail}"
    if "trust_remote_code" in text or "custom code" in text:
        return (
            "needs code of its own (auto_map), which runs only with trust_remote_code=True (--trust-remote-code) for "
            "the model named: read that code first, or name a model of a family that transformers has"
        )
    if isinstance(error, ImportError):
        return f"needs a package that is missing: name a model without it (an unquantized one) or install it {detail}"
    if type(error).__name__ == "UnpicklingError" or "PytorchStreamReader" in text:
        return (
            "has a pickled checkpoint that is damaged or holds more than tensors, which would run code: save it as "
            f"safetensors {detail}"
        )
    if "does not recognize this architecture" in text or "Unrecognized configuration class" in text:
        return f"is of a family that is not supported: name a model of another {detail}"
    return f"is not a folder that transformers can load: check its files {detail}"
