"""The Triton engine: the bits of the model's own blocks, and few launches. On a CPU the references of its ops run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rgtg_fast import Guidance, RewardGuidedDecoder, RGTGError, SequenceReward
from rgtg_fast.models import layers as layers_module
from rgtg_fast.models.layers import TransformersLayers, choose_layers
from rgtg_fast.models.loading import language_runner, reward_runner
from rgtg_fast.models.native_families import FAMILIES as RUN
from rgtg_fast.models.triton_layers import TritonLayers
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.engine.support import prompts_of
from tests.engine.test_ahead import as_numbers, recorded
from tests.models import windowed
from tests.models.adapters import write_adapter
from tests.models.test_families import FAMILIES, PREFIXES, _model

OWN = [
    name
    for name in FAMILIES
    if name.partition("-")[0] in ("llama", "llama3", "qwen2", "qwen3", "mistral", "gemma")
]
GREEDY = Guidance(k=5, beta=1.0, temperature=0)


def states(model: Any, engine: str, make: Any = language_runner, normed: bool = True) -> list[torch.Tensor]:
    """States of a prefill and of two steps with three candidates, over ragged prefixes."""
    runner = make(model, engine, None)
    runner.reserve(len(PREFIXES), 16)
    found = [runner.prefill(slot, ids) for slot, ids in enumerate(PREFIXES)]
    for step in range(2):
        tokens = torch.arange(9).view(3, 3) + 7 * step
        found.append(runner.step(tokens, normed))
        runner.commit(torch.tensor([0, 2, 1]))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", OWN)
@torch.inference_mode()
def test_states_have_the_bits_of_the_models_own_blocks(family: str, dtype: torch.dtype) -> None:
    for auto, make in (
        (tf.AutoModelForCausalLM, language_runner),
        (tf.AutoModelForSequenceClassification, reward_runner),
    ):
        model = _model(auto, family, **({"num_labels": 1} if make is reward_runner else {})).to(dtype)
        for normed in (True, False):
            own = states(model, "transformers", make, normed)
            for x, y in zip(states(model, "triton", make, normed), own, strict=True):
                assert torch.equal(x, y)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
@torch.inference_mode()
def test_windows_are_those_of_the_models_own_blocks(family: str) -> None:
    model = windowed.language_model(family)
    found = []
    for engine in ("transformers", "triton"):
        runner = language_runner(model, engine, None)
        assert runner.windows
        runner.reserve(2, 40)
        states = [
            runner.prefill(0, list(range(2, 26))),
            runner.prefill(0, [30, 31]),
            runner.prefill(1, [5, 6]),
        ]
        for step in range(3):
            states.append(runner.step(torch.tensor([[7, 8, 9], [10, 11, 12]]) + step))
            runner.commit(torch.tensor([2, 0]))
        found.append(states)
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


class Launches(TorchDispatchMode):
    """Counts the operators that launch a kernel: all but allocations, and those that return their input's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        }
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        view = not func._schema.is_mutable and all(x.untyped_storage().data_ptr() in given for x in made)
        name = func._schema.name.partition("::")[2]
        if not view and name not in ("empty", "new_empty"):
            self.found[name] += 1
        return result


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2", "qwen3", "gemma"])
@torch.inference_mode()
def test_a_layer_has_few_launches(family: str) -> None:
    """Launches of a step by layer: the difference between models of three and of two layers."""
    counts = []
    for layers in (2, 3):
        runner = language_runner(
            _model(tf.AutoModelForCausalLM, family, num_hidden_layers=layers), "triton", None
        )
        runner.fuse_projections()
        runner.reserve(1, 16)
        runner.prefill(0, [5, 6, 7])
        with Launches() as launches:
            runner.step(torch.tensor([[3, 4, 5, 6]]))
        counts.append(launches.found)
    layer = counts[1] - counts[0]
    assert layer["add_rms_norm"] == 2
    assert layer["rope_and_store"] == layer["tree_attention"] == layer["act_and_mul"] == 1
    assert layer["linear"] == 4
    assert layer.total() == 9, layer


@pytest.mark.parametrize("adapter", [False, True])
def test_guided_decoding_is_that_of_the_models_own_blocks(adapter: bool, tmp_path: Path) -> None:
    rows = []
    for engine, fuse in (("transformers", False), ("triton", False), ("triton", True)):
        model, tokenizer = make_lm(), make_tokenizer()
        reward = write_adapter(tmp_path / "guide", model, fork=1) if adapter else (make_rm(), tokenizer)
        decoder = RewardGuidedDecoder.from_pretrained(
            (model, tokenizer), SequenceReward(reward), engine=engine, fuse_projections=fuse, max_batch=2
        )
        assert decoder.describe()["lm_engine"] == engine
        rows.append(as_numbers(decoder.generate(prompts_of(5), 9, GREEDY)))
        if fuse:
            # A recorded step replays the same.
            recorded(decoder)
            assert as_numbers(decoder.generate(prompts_of(5), 9, GREEDY)) == rows[-1]
    assert rows[1] == rows[0]
    assert [row[0] for row in rows[2]] == [row[0] for row in rows[0]]


def test_changed_weights_are_taken_over() -> None:
    model, tokenizer = make_lm(), make_tokenizer()
    decoder = RewardGuidedDecoder.from_pretrained((model, tokenizer), engine="triton")
    before = decoder.generate(prompts_of(3), 6, GREEDY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    own = RewardGuidedDecoder.from_pretrained((model, tokenizer), engine="transformers")
    after = decoder.generate(prompts_of(3), 6, GREEDY)
    assert as_numbers(after) == as_numbers(own.generate(prompts_of(3), 6, GREEDY))
    assert as_numbers(after) != as_numbers(before)


class OnGpu:
    """A model that says that it is on a GPU."""

    def __init__(self, model: Any):
        self.model, self.device = model, torch.device("cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def test_auto_is_this_engine_on_a_gpu_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        layers_module.NativeLayers, "supported", staticmethod(lambda model: "its weights are on a GPU")
    )
    monkeypatch.setattr(layers_module._triton, "missing_reason", lambda: "")
    monkeypatch.setattr(layers_module, "use_prefix_attention", lambda model: None)
    llama, opt = (OnGpu(_model(tf.AutoModelForCausalLM, family)) for family in ("llama-gqa", "opt"))
    assert choose_layers(llama, "auto")[0] == "triton"  # pyright: ignore[reportArgumentType]
    assert choose_layers(opt, "auto")[0] == "transformers"  # pyright: ignore[reportArgumentType]
    assert choose_layers(llama, "transformers")[0] == "transformers"  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(layers_module._triton, "missing_reason", lambda: "Triton is not installed")
    assert choose_layers(llama, "auto")[0] == "transformers"  # pyright: ignore[reportArgumentType]
    assert choose_layers(llama.model, "auto")[0] == "transformers"


def test_a_model_that_these_layers_compute_wrongly_runs_its_own_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def chosen(model: Any, engine: str) -> Any:
        own = TransformersLayers(model)
        if engine == "transformers":
            return engine, own
        wrong = TritonLayers(model, own)
        wrong._eps = 0.5
        return "triton", wrong

    monkeypatch.setattr("rgtg_fast.models.runner.choose_layers", chosen)
    assert (
        language_runner(_model(tf.AutoModelForCausalLM, "llama-gqa"), "auto", None).engine == "transformers"
    )
    with pytest.raises(RGTGError, match="its cached forward differs from its own"):
        language_runner(_model(tf.AutoModelForCausalLM, "llama-gqa"), "triton", None)


def test_what_it_cannot_run_is_refused_by_name() -> None:
    for family in ("opt", "phi"):
        with pytest.raises(RGTGError, match="engine='triton' cannot run .*is not one of " + ", ".join(RUN)):
            language_runner(_model(tf.AutoModelForCausalLM, family), "triton", None)
    relu = _model(tf.AutoModelForCausalLM, "llama-gqa", hidden_act="relu")
    with pytest.raises(RGTGError, match="activation 'relu' is not one of"):
        language_runner(relu, "triton", None)
    hooked = _model(tf.AutoModelForCausalLM, "llama-gqa")
    hooked.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(RGTGError, match=r"layers\.1\.mlp has hooks or a forward of its own"):
        language_runner(hooked, "triton", None)
    assert TritonLayers.unsupported(hooked) is not None
    with pytest.raises(RGTGError, match="compile and engine='triton'"):
        RewardGuidedDecoder.from_pretrained((make_lm(), make_tokenizer()), engine="triton", compile=True)


@torch.inference_mode()
def test_compiled_steps_are_the_models_own_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    runner = language_runner(_model(tf.AutoModelForCausalLM, "llama-gqa"), "triton", None)
    runner.compile()
    assert runner.engine == "transformers"
    assert runner.layers.final_norm is None
    runner.reserve(1, 16)
    runner.prefill(0, [5, 6, 7])
    with Launches() as launches:
        runner.step(torch.tensor([[3, 4]]))
    assert launches.found["add_rms_norm"] == 0


def test_a_hook_that_is_added_later_is_noticed() -> None:
    model, tokenizer = make_lm(), make_tokenizer()
    decoder = RewardGuidedDecoder.from_pretrained((model, tokenizer), engine="triton")
    layer: Any = model.model.layers[1]
    layer.register_forward_hook(lambda *_: None)
    with pytest.raises(RGTGError, match="hooks were added or removed"):
        decoder.generate(prompts_of(1), 3, GREEDY)
