"""Adapters: equal to PEFT's, refused where they change more than linear layers, merged only into copies."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rgtg_fast import RewardGuidedDecoder, RGTGError
from rgtg_fast.models.adapter import Adapter, decoder_layers, is_adapter, linear_shape
from rgtg_fast.models.fingerprint import fingerprint
from rgtg_fast.models.loading import language_runner
from tests.conftest import make_lm, make_tokenizer
from tests.models.adapters import write_adapter
from tests.models.test_families import FAMILIES

IDS = [9, 8, 7, 20, 21, 33]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3}},
        {"alpha_pattern": {"q_proj": 5, "model.layers.0.mlp.down_proj": 40}},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
    ],
)
def test_merged_and_hooked_equal_peft(tmp_path: Path, settings: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'rgtg-fast[train]'")
    lm = make_lm()
    config = lm.config
    config.num_labels = 1
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    classifier.base_model.load_state_dict(lm.base_model.state_dict())
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        task_type="SEQ_CLS",
        init_lora_weights=False,
        **{"target_modules": "all-linear", **settings},
    )
    tuned = peft.get_peft_model(classifier, lora).eval()
    tuned.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = tuned(torch.tensor([IDS])).logits
        adapter = Adapter.load(tmp_path)
        merged = adapter.merged(lm)(torch.tensor([IDS])).logits
        attached = language_runner(lm, "transformers", None).attach(adapter)
        hooked = attached.hidden_uncached(IDS)[-1:] @ adapter.reward_head().weight.T
    assert adapter.fork == (1 if "layers_to_transform" in settings else 0)
    assert float(adapter.reward_head().weight.std()) > 0
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hooked, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("engine", ["transformers", "auto"])
def test_every_family_shares_its_forward(tmp_path: Path, family: str, engine: str) -> None:
    check_shared_forward(tmp_path, family, engine)


@pytest.mark.parametrize(
    "family",
    ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma", "phi", "gpt-neox", "opt"))],
)
def test_families_share_a_compiled_forward(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced as one graph; the backend runs it without generating code, which would take longer."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    check_shared_forward(tmp_path, family, "transformers", compile=True)


def check_shared_forward(tmp_path: Path, family: str, engine: str, compile: bool = False) -> None:
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    layer = decoder_layers(lm)[0]
    names = tuple(name for name, module in layer.named_modules() if linear_shape(module) is not None)
    adapter = Adapter.load(write_adapter(tmp_path, lm, 1, names=names, head=None))
    runner = language_runner(lm, engine, None)
    attached = runner.attach(adapter)
    if compile:
        runner.compile()
    own = adapter.merged(lm)
    texts = [IDS, IDS[:2], IDS[1:5]]
    with torch.inference_mode():
        runner.reserve(3, len(IDS), shared_forward=True)
        for slot, ids in enumerate(texts):
            runner.prefill(slot, ids[:-1])
        runner.step(torch.tensor([[3, ids[-1]] for ids in texts]))
        runner.commit(torch.ones(3, dtype=torch.int64))
        logits, states = runner.next_logits(3), attached.newest()
        for slot, ids in enumerate(texts):
            text = torch.tensor([ids])
            expected = lm(input_ids=text, use_cache=False).logits[0, -1]
            torch.testing.assert_close(logits[slot], expected, rtol=1e-3, atol=1e-3)
            expected = own.base_model(text, use_cache=False).last_hidden_state[0, -1]
            torch.testing.assert_close(states[slot], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("adapters", [1, 2])
def test_first_factors_of_layers_with_one_input_are_multiplied_together(
    tmp_path: Path, adapters: int
) -> None:
    """Counts the matrix products of a step: q, k and v read one input, gate and up another."""
    lm = make_lm(num_hidden_layers=3)
    runner = language_runner(lm, "transformers", None)
    for i in range(adapters):
        runner.attach(Adapter.load(write_adapter(tmp_path / str(i), lm, 1, rank=2 + i)))
    runner.reserve(2, len(IDS))
    with torch.inference_mode(), Operators() as operators:
        runner.step(torch.tensor([[3, 4], [5, 6]]))
    assert operators.calls["aten.linear.default"] == 3 * 7 + 2 * 4
    assert operators.calls["aten.baddbmm_.default"] == adapters * 2 * 7


class Operators(TorchDispatchMode):
    """Counts calls by the operator's name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_merging_leaves_the_base_alone(tmp_path: Path) -> None:
    lm = make_lm()
    before = fingerprint(lm), [parameter.clone() for parameter in lm.parameters()]
    own = Adapter.load(write_adapter(tmp_path, lm, 1)).merged(lm)
    assert fingerprint(lm) == before[0] != fingerprint(own)
    assert all(torch.equal(a, b) for a, b in zip(lm.parameters(), before[1], strict=True))


def test_a_fingerprint_is_of_the_trunk() -> None:
    one, other = make_lm(), make_lm(seed=1)
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(make_lm()) == fingerprint(make_lm().to(torch.bfloat16))
    with torch.no_grad():
        one.lm_head.weight.zero_()
    assert fingerprint(one) == fingerprint(make_lm())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "is a IA3 adapter: only LORA"),
        ({"use_dora": True}, "has DoRA magnitudes"),
        ({"bias": "all"}, "trained biases"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
        ({"trainable_token_indices": [1]}, "retrained token embeddings"),
    ],
)
def test_unsupported_adapters_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_adapter(tmp_path, make_lm(), 1, **change)
    with pytest.raises(RGTGError, match=message) as error:
        Adapter.load(tmp_path)
    assert "\n" not in str(error.value)


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, make_lm(), 1)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for key in (
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector",
    ):
        save_file({**tensors, key: torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(RGTGError, match="only a head"):
            Adapter.load(tmp_path)
    half = {key: value for key, value in tensors.items() if not key.endswith("up_proj.lora_B.weight")}
    save_file(half, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RGTGError, match="only one of its two factors"):
        Adapter.load(tmp_path)


def test_folders_without_an_adapter(tmp_path: Path) -> None:
    assert not is_adapter(tmp_path)
    assert not is_adapter(make_lm())
    with pytest.raises(RGTGError, match=r"contains no adapter_config\.json"):
        Adapter.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(RGTGError, match=r"contains no adapter_model\.safetensors"):
        Adapter.load(tmp_path)


def test_a_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    lm = make_lm()
    adapter = Adapter.load(write_adapter(tmp_path, lm, 1))
    assert adapter.base_mismatch(lm) is None
    assert "was trained on other weights" in str(adapter.base_mismatch(make_lm(seed=3)))
    wide = make_lm(intermediate_size=64)
    assert "mlp.down_proj" in str(adapter.shape_mismatch(wide))
    with pytest.raises(RGTGError, match=r"mlp\.down_proj"):
        language_runner(wide, "auto", None).attach(adapter)
    assert "does not have" in str(adapter.shape_mismatch(make_lm(num_hidden_layers=1)))


def test_a_reward_needs_one_label(tmp_path: Path) -> None:
    lm = make_lm()
    for head, words in ((None, "no head"), (3, "a head of 3 labels")):
        adapter = Adapter.load(write_adapter(tmp_path / str(head), lm, 1, head=head))
        with pytest.raises(RGTGError, match=words):
            adapter.reward_head()


def test_without_a_fingerprint_the_name_decides(tmp_path: Path) -> None:
    lm = make_lm()
    lm.config._name_or_path = "somebody/model"
    (write_adapter(tmp_path, lm, 1) / "rgtg_fast.json").unlink()
    adapter = Adapter.load(tmp_path)
    assert adapter.base_mismatch(lm) is None
    lm.config._name_or_path = "somebody/other"
    assert "was trained on somebody/model, not on somebody/other" in str(adapter.base_mismatch(lm))


FIRST, SECOND = (f"base_model.model.model.layers.1.self_attn.q_proj.lora_{factor}.weight" for factor in "AB")
SCORE = "base_model.model.score.weight"
Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
BROKEN: dict[str, tuple[Change, str]] = {
    "compiled": (lambda t: {f"_orig_mod.{key}": x for key, x in t.items()}, "torch.compile"),
    "distributed": (lambda t: {f"module.{key}": x for key, x in t.items()}, "DistributedDataParallel"),
    "unknown": (lambda t: {**t, "foo": torch.ones(1)}, "holds 'foo'"),
    "half a pair": (
        lambda t: {k: x for k, x in t.items() if k != FIRST},
        "only one of its two factors (lora_B)",
    ),
    "no pair": (
        lambda t: {k: x for k, x in t.items() if "1.self_attn.q" not in k},
        "lacks the factors of 'layer 1",
    ),
    "another rank": (
        lambda t: {**t, FIRST: t[FIRST][:2], SECOND: t[SECOND][:, :2]},
        "rank 2 in its file and r=4",
    ),
    "two ranks": (lambda t: {**t, FIRST: t[FIRST][:2]}, "A [2, 32] and B [32, 4]"),
    "no rank": (lambda t: {**t, FIRST: t[FIRST][:0], SECOND: t[SECOND][:, :0]}, "A [0, 32] and B [32, 0]"),
    "a vector": (lambda t: {**t, FIRST: t[FIRST][0]}, "A [32] and B [32, 4]"),
    "integers": (lambda t: {**t, FIRST: t[FIRST].int()}, "torch.int32"),
    "another width": (lambda t: {**t, FIRST: t[FIRST][:, :30]}, "is (32, 30) at layer 1 self_attn.q_proj"),
    "another layer": (lambda t: {k.replace("s.1.", "s.7."): x for k, x in t.items()}, "changes layer 7"),
    "a flat head": (lambda t: {**t, SCORE: torch.ones(32)}, "shapes [[32]]"),
    "a wide head": (lambda t: {**t, SCORE: torch.ones(1, 30)}, "a head on 30 numbers"),
    "an integer head": (lambda t: {**t, SCORE: torch.ones(1, 32).int()}, "a head of torch.int32"),
    "another bias": (lambda t: {**t, SCORE.replace("weight", "bias"): torch.ones(3)}, "[[1, 32], [3]]"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_do_not_hold_their_adapter(case: str, tmp_path: Path) -> None:
    change, words = BROKEN[case]
    lm = make_lm()
    file = write_adapter(tmp_path, lm) / "adapter_model.safetensors"
    save_file({key: x.clone().contiguous() for key, x in change(load_file(file)).items()}, file)
    with pytest.raises(RGTGError) as error:
        RewardGuidedDecoder.from_pretrained((lm, make_tokenizer()), reward=str(tmp_path))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 8}, "rank 4 in its file and r=8"),
        ({"lora_alpha": "much"}, "lora_alpha='much'"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern="),
        ({"rank_pattern": 5}, "rank_pattern=5"),
        ({"modules_to_save": ["lm_head"]}, "its file contains none"),
    ],
)
def test_configurations_that_do_not_fit_the_weights(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(RGTGError) as error:
        Adapter.load(write_adapter(tmp_path, make_lm(), **settings))
    assert words in str(error.value)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "rgtg_fast.json"])
@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"", b"{bad", b"[1]"])
def test_files_without_content(name: str, content: bytes, tmp_path: Path) -> None:
    (write_adapter(tmp_path, make_lm()) / name).write_bytes(content)
    with pytest.raises(RGTGError) as error:
        Adapter.load(tmp_path)
    assert f"its {name}" in str(error.value)
    assert "\n" not in str(error.value)
