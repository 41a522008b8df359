"""What of the GPU benchmark can be checked without one: its cases, bytes, arguments and rivals' inputs."""

from __future__ import annotations

import pytest
import torch

from benchmarks.ops import gpu_ops
from rgtg_fast.ops import topk_logprobs, tree_attention
from tests.ops.specs import SPECS


def test_every_op_has_cases_and_bytes():
    found = list(gpu_ops.cases())
    assert {case.op for case in found} == {*SPECS, "linear"} - {"invariant_linear"}
    # A product reads its weights and rows once.
    (product,) = (case for case in found if case.shape == {"M": 10, "N": 6144, "K": 4096, "layer": "qkv"})
    assert gpu_ops.moved_bytes(product) == 2 * (6144 * 4096 + 10 * (6144 + 4096))
    assert [who for who, *_ in gpu_ops.rivals(product)] == ["torch linear", "invariant_linear"]
    assert all(gpu_ops.moved_bytes(case) > 0 for case in found)
    case = gpu_ops.Case("tree_attention", {"B": 1, "H": 8, "G": 2, "S": 1, "T": 10, "D": 4, "lengths": [10]})
    assert gpu_ops.moved_bytes(case) == 2 * (2 * 2 * 10 * 4 + 2 * 10 * 4)


def test_arguments(capsys):
    assert gpu_ops.main(["--list", "--ops", "commit"]) == 0
    assert capsys.readouterr().out.count("commit") == 2
    with pytest.raises(SystemExit):
        gpu_ops.main(["--ops", "nothing"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be measured")
def test_without_a_gpu_nothing_is_written(tmp_path, capsys):
    assert gpu_ops.main(["--output", str(tmp_path / "out.csv")]) == 2
    assert "nothing was measured" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_quantiles_and_copies():
    assert gpu_ops.quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (2.0, 3.5, 5.0)
    assert gpu_ops.copies(1) == gpu_ops.MAX_COPIES
    assert gpu_ops.copies(1 << 40) == 2


def test_the_rivals_compute_the_same():
    arguments = SPECS["tree_attention"].make_inputs(
        {"B": 2, "H": 4, "G": 2, "S": 3, "T": 9, "D": 8, "lengths": [9, 9]}, torch.float32
    )
    got = gpu_ops.torch_sdpa(gpu_ops.replicated(arguments))  # [B·S, H, 1, D]
    torch.testing.assert_close(got[:, :, 0].view(2, 3, 4, 8).transpose(1, 2), tree_attention(**arguments))
    assert gpu_ops.packed(arguments)["q"].shape == (2, 1, 12, 8)
    # Over the prefix alone, as tokens that see no new one.
    one = gpu_ops.torch_sdpa(gpu_ops.one_prefix(arguments)).unflatten(2, (2, 3)).flatten(1, 2)  # [B, H, S, D]
    nothing_new = torch.zeros(2, 3, dtype=torch.int64)
    torch.testing.assert_close(one, tree_attention(**{**arguments, "ancestors": nothing_new}))
    logits = {"logits": torch.randn(2, 50), "k": 5, "guidance": None, "beta": None}
    for ours, theirs in zip(topk_logprobs(**logits)[:2], gpu_ops.torch_topk(logits), strict=True):
        torch.testing.assert_close(ours, theirs)
    for case in gpu_ops.cases():
        assert all(callable(part) for _, *parts in gpu_ops.rivals(case) for part in parts)
