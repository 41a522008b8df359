"""Truncated, changed and foreign adapter files are refused in one line, or read correctly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rgtg_fast import RewardGuidedDecoder, RGTGError, SequenceReward
from rgtg_fast.models.adapter import CONFIG, RECIPE, WEIGHTS, Adapter, LowRank
from rgtg_fast.models.cpp_layers import NativeLayers
from tests.conftest import make_lm, make_tokenizer
from tests.models.adapters import write_adapter

PREFIX = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
FAST = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def lm() -> Any:
    return make_lm()


@pytest.fixture(scope="module")
def original(lm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ("self_attn.q_proj", "mlp.down_proj")
    return write_adapter(tmp_path_factory.mktemp("adapter"), lm, 1, names=names)


def _copy(original: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    return folder


def _refusal(lm: Any, folder: Path) -> str | None:
    """The message with which an adapter is refused; None where the native engine runs it with finite results."""
    try:
        adapter = Adapter.load(folder)
        adapter.reward_head()
        reason = adapter.shape_mismatch(lm) or NativeLayers.supported(lm.base_model)
        if reason:
            raise RGTGError(reason)
        native = NativeLayers(lm.base_model)
        native.adapt([adapter])
        sizes = (native.layers, 2, native.kv_heads, 1, native.head_dim)
        new = [torch.zeros(sizes) for _ in range(4)]
        zero = torch.zeros(2, 1, dtype=torch.int64)
        states = native.forward(zero + 5, zero, *new[:2], zero[:, 0], *new[2:], branches=2)
    except RGTGError as error:
        return str(error)
    assert states.isfinite().all()
    return None


def _check(lm: Any, folder: Path) -> None:
    """A refusal is one line."""
    assert "\n" not in (_refusal(lm, folder) or "")


# ---- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((2_000, 32), (32, 1)),
        ((4, 32), (32, 3)),
        ((3, 32), (32, 4)),
        ((0, 32), (32, 0)),
        ((4,), (32, 4)),
        ((4, 32), (128,)),
        ((4, 32, 1), (32, 4)),
        ((), ()),
        ((4, 31), (32, 4)),
        ((4, 32), (33, 4)),
        ((4, 0), (32, 4)),
    ],
)
def test_factors_that_do_not_fit_are_refused(
    lm: Any, original: Path, tmp_path: Path, a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    folder = _copy(original, tmp_path)
    tensors = load_file(folder / WEIGHTS)
    tensors |= {f"{PREFIX}A.weight": torch.ones(a), f"{PREFIX}B.weight": torch.ones(b)}
    save_file(tensors, folder / WEIGHTS)
    refusal = _refusal(lm, folder)
    assert refusal is not None
    assert "self_attn.q_proj" in refusal


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        ((32,), None),
        ((1, 31), None),
        ((2, 32), None),
        ((1, 32), (2,)),
        ((1, 0), None),
        ((), None),
        ((1, 32, 1), None),
    ],
)
def test_heads_that_do_not_fit_are_refused(
    lm: Any, original: Path, tmp_path: Path, weight: tuple[int, ...], bias: tuple[int, ...] | None
) -> None:
    folder = _copy(original, tmp_path)
    tensors = load_file(folder / WEIGHTS)
    tensors["base_model.model.score.weight"] = torch.ones(weight)
    if bias is not None:
        tensors["base_model.model.score.bias"] = torch.ones(bias)
    save_file(tensors, folder / WEIGHTS)
    assert _refusal(lm, folder) is not None


def test_a_decoder_refuses_an_adapter_of_two_ranks(lm: Any, original: Path, tmp_path: Path) -> None:
    folder = _copy(original, tmp_path)
    tensors = load_file(folder / WEIGHTS)
    tensors |= {f"{PREFIX}A.weight": torch.zeros(4, 32), f"{PREFIX}B.weight": torch.zeros(32, 3)}
    save_file(tensors, folder / WEIGHTS)
    for share_trunk in (None, True, False):
        with pytest.raises(RGTGError, match=r"q_proj has the factors A \[4, 32\] and B \[32, 3\]"):
            RewardGuidedDecoder.from_pretrained(
                (lm, make_tokenizer()), reward=SequenceReward(folder, share_trunk=share_trunk)
            )


def test_the_extension_refuses_factors_that_do_not_fit(lm: Any, original: Path) -> None:
    """An adapter that was changed after the checks in Python."""
    if reason := NativeLayers.supported(lm.base_model):
        pytest.skip(f"the native engine does not run here: {reason}")
    native = NativeLayers(lm.base_model)
    for a, b in (((4, 31), (32, 4)), ((5, 32), (32, 4)), ((4, 32), (16, 4)), ((4, 32), (64, 4))):
        adapter = Adapter.load(original)
        pair = adapter.low_rank[1, "self_attn.q_proj"]
        object.__setattr__(pair, "a", torch.zeros(a))
        object.__setattr__(pair, "b", torch.zeros(b))
        with pytest.raises(ValueError, match="lora_"):
            native.adapt([adapter])
    native.adapt([Adapter.load(original)])


def test_the_shapes_of_a_low_rank_update_are_checked() -> None:
    with pytest.raises(RGTGError, match=r"A \[4, 32\] and B \[32, 3\]"):
        LowRank(torch.zeros(4, 32), torch.zeros(32, 3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_integer_factors_are_refused(lm: Any, original: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = _copy(original, tmp_path)
    tensors = load_file(folder / WEIGHTS)
    tensors[f"{PREFIX}A.weight"] = torch.ones(4, 32, dtype=dtype)
    save_file(tensors, folder / WEIGHTS)
    assert "dtype" in (_refusal(lm, folder) or "")


def test_values_that_are_not_finite_are_refused(lm: Any, original: Path, tmp_path: Path) -> None:
    for value in (torch.nan, torch.inf):
        folder = _copy(original, tmp_path)
        tensors = load_file(folder / WEIGHTS)
        tensors[f"{PREFIX}A.weight"][0, 0] = value
        save_file(tensors, folder / WEIGHTS)
        assert "NaN or an infinity" in (_refusal(lm, folder) or "")


def test_two_updates_of_one_layer_are_refused(lm: Any, original: Path, tmp_path: Path) -> None:
    folder = _copy(original, tmp_path)
    tensors = load_file(folder / WEIGHTS)
    for factor in "AB":
        name = f"{PREFIX}{factor}.weight"
        tensors[name.replace("model.model.", "model.vision.")] = tensors[name].clone()
    save_file(tensors, folder / WEIGHTS)
    assert "two pairs of factors for layer 1 self_attn.q_proj" in (_refusal(lm, folder) or "")


# ---- bytes and JSON --------------------------------------------------------------------------------------------------


@FAST
@given(data=st.data())
@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_truncated_and_changed_bytes(
    lm: Any, original: Path, tmp_path: Path, name: str, data: st.DataObject
) -> None:
    folder = _copy(original, tmp_path)
    content = bytearray((folder / name).read_bytes())
    # Half of the changes are in the header, which holds the tensors' offsets.
    header = min(len(content), 1200)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, header - 1) | st.integers(0, len(content) - 1))
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    _check(lm, folder)


@FAST
@given(
    key=st.sampled_from(
        ["peft_type", "base_model_name_or_path", "r", "lora_alpha", "alpha_pattern", "bias", "use_rslora",
         "modules_to_save", "init_lora_weights", "target_modules"]
    ),
    value=ANYTHING,
)  # fmt: skip
def test_settings_of_other_types(lm: Any, original: Path, tmp_path: Path, key: str, value: Any) -> None:
    folder = _copy(original, tmp_path)
    config = json.loads((folder / CONFIG).read_text()) | {key: value}
    (folder / CONFIG).write_text(json.dumps(config))
    _check(lm, folder)


@pytest.mark.parametrize("content", ["", "[]", "null", '"x"', "1", "{", "[" * 100_000, "\ud800"])
def test_files_without_a_json_object_are_refused(original: Path, tmp_path: Path, content: str) -> None:
    for name in (CONFIG, RECIPE):
        folder = _copy(original, tmp_path)
        (folder / name).write_bytes(content.encode("utf-8", "surrogatepass"))
        with pytest.raises(RGTGError, match=name):
            Adapter.load(folder)
