"""What the tests of the ops share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rgtg_fast.ops import _extension
from tests.ops import support
from tests.ops.specs import Tolerance


@pytest.fixture
def compare() -> Callable[[torch.Tensor, torch.Tensor, Tolerance], None]:
    return support.compare


@pytest.fixture
def cpp() -> None:
    """Skips where the extension is not built: say so, do not pass."""
    if _extension.missing_reason():
        pytest.skip(_extension.missing_reason())


@pytest.fixture
def threads():
    """Sets the number of threads and puts the old one back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
