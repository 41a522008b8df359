"""The choice of the backend, its errors, tracing, and an installation without the extension."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from rgtg_fast import RGTGError
from rgtg_fast.ops import (
    _extension,
    _triton,
    backend_of,
    resample,
    topk_logprobs,
    tree_attention,
    use_backend,
)
from tests.ops.specs import SPECS

ROOT = Path(__file__).resolve().parents[2]


def test_backend_of_says_what_serves():
    served = "reference" if _extension.missing_reason() else "cpp"
    for name in SPECS:
        assert backend_of(name, "cpu") == (served if SPECS[name].has_cpp else "reference")
        on_cuda = "reference" if _triton.missing_reason() else "triton"
        assert backend_of(name, torch.device("cuda:0"), torch.bfloat16) == on_cuda
        assert backend_of(name, "cuda", torch.int8) == "reference"
        assert backend_of(name, "cpu", torch.int8) == "reference"
    assert backend_of("tree_attention", "cpu", torch.bfloat16) == served
    assert backend_of("tree_attention", "cpu", torch.float64) == "reference"
    with use_backend("reference"):
        assert backend_of("tree_attention", "cpu") == "reference"
    assert backend_of("tree_attention", "cpu") == served


def test_unknown_names_are_named():
    with pytest.raises(
        RGTGError, match="there is no op 'topk': use one of act_and_mul, add_rms_norm, commit"
    ):
        backend_of("topk", "cpu")
    with (
        pytest.raises(RGTGError, match="there is no backend 'cuda': use one of reference, cpp, triton"),
        use_backend("cuda"),
    ):
        pass


def test_triton_says_what_it_does_not_take(monkeypatch):
    monkeypatch.setattr(_triton, "missing_reason", lambda: "")
    logits = torch.zeros(1, 600)
    with use_backend("triton"):
        with pytest.raises(RGTGError, match=r"serve tensors on CUDA, not on cpu .*TRITON_INTERPRET=1"):
            topk_logprobs(logits, 2)
        with pytest.raises(RGTGError, match=r"its Triton kernel does not take torch.float64: use float32"):
            backend_of("tree_attention", "cuda", torch.float64)
        with pytest.raises(RGTGError, match="its Triton kernel takes k <= 256, not 300"):
            backend_of("topk_logprobs", "cuda", k=300)
    assert backend_of("topk_logprobs", "cuda", k=300) == "reference"
    assert backend_of("tree_attention", "cuda", D=512) == "reference"
    assert backend_of("tree_attention", "cuda", D=256) == "triton"
    assert backend_of("commit", "cuda", torch.float64) == "triton"


def test_without_triton_the_reference_serves_cuda_and_the_backend_is_refused_with_the_reason(monkeypatch):
    reason = "Triton is not installed (No module named 'triton'): pip install triton"
    monkeypatch.setattr(_triton, "missing_reason", lambda: reason)
    assert backend_of("resample", "cuda") == "reference"
    with (
        pytest.raises(
            RGTGError, match=r"backend 'triton' is missing: Triton is not installed .*pip install triton"
        ),
        use_backend("triton"),
    ):
        pass


@pytest.mark.usefixtures("cpp")
def test_cpp_refuses_what_it_does_not_take():
    with use_backend("cpp"):
        with pytest.raises(
            RGTGError, match=r"cannot serve topk_logprobs: its C\+\+ kernel does not take torch.float64"
        ):
            topk_logprobs(torch.zeros(1, 4, dtype=torch.float64), 2)
        with pytest.raises(RGTGError, match="serve tensors on the CPU, not on cuda"):
            backend_of("topk_logprobs", "cuda")


def test_use_backend_ends_with_its_block_even_by_an_error():
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert backend_of("commit", "cpu") == ("reference" if _extension.missing_reason() else "cpp")


def test_compiles_as_one_graph():
    def step(logits, rewards, beta, temperature, seed, position):
        logprobs, tokens, entropy = topk_logprobs(logits * 2, 5)
        choice, logprob = resample(logprobs, rewards, beta, temperature, seed, position)
        return tokens.gather(1, choice[:, None]), logprob, entropy

    one, zero = torch.ones(3), torch.zeros(3, dtype=torch.int64)
    random = torch.Generator().manual_seed(0)
    arguments = (
        torch.randn(3, 40, generator=random),
        torch.randn(3, 5, generator=random),
        one,
        one,
        zero,
        zero,
    )
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*arguments), step(*arguments), strict=True):
        assert torch.equal(got, want)


def test_attention_compiles_with_a_changing_number_of_tokens():
    arguments = SPECS["tree_attention"].make_inputs
    compiled = torch.compile(tree_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for S in (3, 4, 7):
        shape = {"B": 2, "H": 4, "G": 2, "S": S, "T": 20, "D": 16, "window": 5, "softcap": 2.0, "sinks": True}
        case = arguments(shape, torch.float32)
        assert torch.equal(compiled(**case), tree_attention(**case))


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["rgtg_fast._C"] = None          # what an installation without a compiler looks like
import torch
from rgtg_fast import RGTGError
from rgtg_fast.ops import backend_of, topk_logprobs, use_backend
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        logprobs, tokens, entropy = topk_logprobs(torch.tensor([[1.0, 3.0, 2.0]]), 2)
assert tokens.tolist() == [[1, 2]]
assert backend_of("topk_logprobs", "cpu") == "reference"
messages = [str(w.message) for w in seen if "rgtg_fast" in str(w.message)]
assert len(messages) == 1, messages
assert "\\n" not in messages[0] and "pip install" in messages[0]
assert "falling back to the slower PyTorch reference" in messages[0]
try:
    with use_backend("cpp"):
        pass
except RGTGError as error:
    assert "not installed" in str(error) and "pip install" in str(error), error
else:
    raise AssertionError("use_backend('cpp') must refuse")
"""


def test_without_the_extension_the_reference_serves_and_says_so_once():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSION], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize(
    ("name", "message"), [("sse9", "is unknown: use generic, avx2"), ("", None), ("plain", None)]
)
def test_the_instruction_set_can_be_named(name, message):
    done = subprocess.run(
        [sys.executable, "-c", "from rgtg_fast import _C; print(_C.isa())"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "RGTG_FAST_ISA": name},
    )
    if message is None:
        assert done.returncode == 0
        assert done.stdout.strip() in ("generic", "avx2", "avx512", "avx512bf16", "amx")
    else:
        assert done.returncode != 0
        assert message in done.stderr


def test_importing_the_ops_imports_no_models():
    code = (
        "import sys, rgtg_fast.ops; assert 'transformers' not in sys.modules and 'triton' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_source_tree_without_kernels_names_the_copy_that_has_them(tmp_path, monkeypatch):
    """What Python says in the folder of a clone, where the package was installed without -e."""
    monkeypatch.setattr(sys, "path", [str(ROOT)])
    assert "install a C++17 compiler" in _extension.remedy()
    (tmp_path / "rgtg_fast").mkdir()
    (tmp_path / "rgtg_fast" / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    monkeypatch.setattr(sys, "path", [str(ROOT), str(tmp_path)])
    monkeypatch.setattr(_extension, "_import", lambda: (None, "No module named 'rgtg_fast._C'"))
    told = re.escape(f"source tree {ROOT}, and the copy in {tmp_path} has them: build them in the tree too")
    with pytest.raises(RGTGError, match=told) as error, use_backend("cpp"):
        pass
    assert "\n" not in str(error.value)
    monkeypatch.setattr(_extension, "_warn", _extension._warn.__wrapped__)
    with pytest.warns(UserWarning, match=told):
        assert _extension.load() is None
