"""The tokenizer of a GGUF file: rebuilt by transformers from the metadata, and checked against it."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rgtg_fast.errors import RGTGError, one_line

# How byte-level tokenizers split a text before merging, by `tokenizer.ggml.pre`. transformers' reader knows these.
_SPLITS = {
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe", "tekken", "gpt-4o", "llama4"),
    *("qwen2", "deepseek-r1-qwen", "megrez"),
}
# These are split as GPT-2 splits, which is the reader's default.
_LIKE_GPT2 = {"gpt-2", "phi-2", "olmo", "mpt"}
# As GPT-2, with each digit on its own.
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r"}
# These take a word that is in the vocabulary whole, and llama.cpp begins a text with BOS where the file says nothing.
_LLAMA3 = {"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"}
# transformers' names of special tokens, and those of GGUF's metadata.
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_CONTROL, _MARKER = 3, re.compile(r"[<\[].*[>\]]$", re.DOTALL)
# The way out of every refusal of a GGUF file.
INSTEAD = "name the folder of the original model"


def save_tokenizer(path: Path, metadata: dict[str, Any], vocabulary: int, folder: Path, title: str) -> None:
    """Writes the tokenizer that a GGUF file's metadata describes.

    Args:
        path: the file.
        metadata: its metadata.
        vocabulary: rows of the model's embedding.
        folder: where to save it.
        title: role and name of the model, for messages.

    Raises:
        RGTGError: none in the file, or one that cannot be rebuilt exactly.
    """
    stated = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    tokens = stated.get("tokens")
    if not tokens:
        raise RGTGError(f"{title} holds no tokenizer: {INSTEAD}")
    _check_kind(stated, str(metadata.get("general.architecture")), title)
    if len(tokens) > vocabulary:
        raise RGTGError(f"{title} has {len(tokens)} tokens and embeddings for {vocabulary}: {INSTEAD}")
    try:
        with redirect_stderr(io.StringIO()):
            tokenizer: Any = AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, trust_remote_code=False
            )
    except Exception as error:  # of a file that it does not expect the reader may raise anything
        raise RGTGError(
            f"{title} has a tokenizer that transformers cannot read ({one_line(error, 120)}): {INSTEAD}"
        ) from error
    tokenizer = _exact(tokenizer, tokens, stated, metadata.get("tokenizer.chat_template"))
    backend, pre = tokenizer.backend_tokenizer, stated.get("pre")
    if pre in _LLAMA3:
        backend.model.ignore_merges = True
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    if pre in _SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    _set_ends(tokenizer, stated, title)
    _check_tokens(tokenizer, tokens, stated, title)
    tokenizer.save_pretrained(folder)


def check_special_tokens(metadata: dict[str, Any], title: str) -> None:
    """Refuses settings of a GGUF file's tokenizer that do not fit its tokens, by name.

    Args:
        metadata: the file's metadata.
        title: role and name of the model, for messages.

    Raises:
        RGTGError: an id without a token, kinds for another number of tokens, or a switch that is none.
    """
    prefix = "tokenizer.ggml."
    count = len(metadata.get(prefix + "tokens") or [])
    for name in (*SPECIAL.values(), "eot"):
        token = metadata.get(f"{prefix}{name}_token_id", 0)
        if count and token not in range(count):
            raise RGTGError(
                f"{title} has {prefix}{name}_token_id = {str(token)[:20]} and {count} tokens: {INSTEAD}"
            )
    kinds = metadata.get(prefix + "token_type")
    if count and kinds is not None and len(kinds) != count:
        raise RGTGError(
            f"{title} has {len(kinds)} kinds of tokens (token_type) and {count} tokens: {INSTEAD}"
        )
    for name in ("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces"):
        switch = metadata.get(prefix + name, False)
        if not isinstance(switch, bool):
            raise RGTGError(
                f"{title} has {prefix}{name} = {str(switch)[:20]!r}, not true or false: {INSTEAD}"
            )


def _exact(tokenizer: Any, tokens: list[str], stated: dict[str, Any], chat_template: str | None) -> Any:
    """A tokenizer with the file's tokens alone: transformers adds those of its own class where the file has none."""
    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["id"]: token for token in saved["added_tokens"] if token["id"] < len(tokens)}
    spelled = {i: word for word, i in saved["model"]["vocab"].items()}
    for i in _markers(tokens, stated):
        # The reader leaves out those with characters that byte-level vocabularies do not have ("<｜User｜>").
        if i not in added and i in spelled:
            del saved["model"]["vocab"][spelled[i]]
            saved["model"]["vocab"][tokens[i]] = i
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            added[i] = {"id": i, "content": tokens[i], **flags, "special": True}
    saved["added_tokens"] = [added[i] for i in sorted(added)]
    unknown = saved["model"].get("unk_token")
    if unknown is not None and unknown not in saved["model"]["vocab"]:
        saved["model"]["unk_token"] = None
    special = {name: stated.get(f"{key}_token_id") for name, key in SPECIAL.items()}
    exact = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(saved)),
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": tokens[i] for name, i in special.items() if i is not None and i < len(tokens)},
    )
    exact.chat_template = chat_template
    return exact


def _markers(tokens: list[str], stated: dict[str, Any]) -> list[int]:
    """Ids of the file's control tokens that are in brackets; others may be words that were marked by mistake."""
    kinds = stated.get("token_type") or []
    return [i for i, kind in enumerate(kinds[: len(tokens)]) if kind == _CONTROL and _MARKER.match(tokens[i])]


def _check_kind(stated: dict[str, Any], architecture: str, title: str) -> None:
    """Refuses tokenizers that the reader rebuilds otherwise than the file describes them."""
    kind, pre = stated.get("model"), stated.get("pre")
    if kind == "gpt2" and pre not in _SPLITS | _LIKE_GPT2 | _SINGLE_DIGITS:
        raise RGTGError(
            f"{title} splits texts by the rule {pre!r} (tokenizer.ggml.pre), which cannot be rebuilt: {INSTEAD}"
        )
    if kind not in ("gpt2", "llama"):
        raise RGTGError(f"{title} has a tokenizer of kind {kind!r}, and gpt2 and llama are read: {INSTEAD}")
    spaced = stated.get("add_space_prefix", True)
    if kind == "llama" and not architecture.startswith("gemma") and not spaced:
        raise RGTGError(
            f"{title} puts no space before a text (add_space_prefix), which cannot be rebuilt: {INSTEAD}"
        )
    if kind == "llama" and stated.get("remove_extra_whitespaces"):
        raise RGTGError(f"{title} removes spaces from texts, which cannot be rebuilt: {INSTEAD}")


def _set_ends(tokenizer: Any, stated: dict[str, Any], title: str) -> None:
    """Makes the tokenizer put BOS and EOS around a text where llama.cpp does."""
    spm = stated.get("model") == "llama"
    wanted = {
        "bos": stated.get("add_bos_token", spm or stated.get("pre") in _LLAMA3),
        "eos": stated.get("add_eos_token", False),
    }
    ends = {name: stated.get(f"{name}_token_id") for name, is_wanted in wanted.items() if is_wanted}
    for name, token in ends.items():
        if token is None:
            raise RGTGError(f"{title} adds {name.upper()} to texts and names no such token: {INSTEAD}")
    text = "a"
    plain = tokenizer.encode(text, add_special_tokens=False)
    expected = [*(t for t in [ends.get("bos")] if t is not None), *plain]
    expected += [t for t in [ends.get("eos")] if t is not None]
    if tokenizer.encode(text) == expected:
        return
    words = {name: tokenizer.convert_ids_to_tokens(token) for name, token in ends.items()}
    frame = [words.get(name) for name in ("bos", "eos")]
    single = " ".join(part for part in (frame[0], "$A", frame[1]) if part)
    pair = " ".join(part for part in (frame[0], "$A", frame[0], "$B:1", frame[1]) if part)
    pairs = [(words[name], token) for name, token in ends.items()]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=pairs
    )
    if tokenizer.encode(text) != expected:
        raise RGTGError(f"{title} has a tokenizer whose BOS and EOS cannot be rebuilt: {INSTEAD}")


def _check_tokens(tokenizer: Any, tokens: list[str], stated: dict[str, Any], title: str) -> None:
    """Compares the special tokens and the size of the vocabulary with the file's."""
    if len(tokenizer) > len(tokens):
        raise RGTGError(
            f"{title} has {len(tokens)} tokens and its tokenizer was rebuilt with {len(tokenizer)}: {INSTEAD}"
        )
    markers = _markers(tokens, stated)
    pieces = tokenizer([tokens[i] for i in markers], add_special_tokens=False).input_ids if markers else []
    for i, found in zip(markers, pieces, strict=True):
        if found != [i]:
            raise RGTGError(
                f"{title} has the control token {tokens[i]!r}, which its tokenizer splits as it was rebuilt: {INSTEAD}"
            )
    for name, key in SPECIAL.items():
        wanted, found = stated.get(f"{key}_token_id"), getattr(tokenizer, f"{name}_token_id")
        if wanted is not None and found != wanted:
            raise RGTGError(
                f"{title} has {key}_token_id {wanted} and its tokenizer was rebuilt with {found}: {INSTEAD}"
            )
