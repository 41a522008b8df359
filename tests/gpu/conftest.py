"""What the tests on a GPU share with those of the ops."""

from tests.ops.conftest import compare

__all__ = ["compare"]
