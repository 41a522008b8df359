"""The table of policy objectives: complete, documented and printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from rgtg_fast import methods
from tests.cli.conftest import Run

ROOT = Path(__file__).parents[2]


def test_every_objective_is_in_the_table() -> None:
    from rgtg_fast.training.policy.config import POLICY_OBJECTIVES

    assert [policy.name for policy in methods.POLICIES] == list(POLICY_OBJECTIVES)


@pytest.mark.parametrize("policy", methods.POLICIES, ids=lambda policy: policy.name)
def test_every_objective_has_its_page(policy: methods.Policy) -> None:
    page = (ROOT / policy.page).read_text(encoding="utf-8")
    assert policy.source.removeprefix("arXiv ") in page
    assert f"--objective {policy.name}" in page
    assert policy.trainer in page


def test_the_index_and_the_command_have_the_table(run: Run) -> None:
    assert methods.policies_markdown() in (ROOT / "docs" / "methods" / "README.md").read_text(
        encoding="utf-8"
    )
    (report,) = run("methods", "--json").rows
    assert report["policies"] == methods.report()["policies"]
    shown = run("methods").out
    for policy in methods.POLICIES:
        assert policy.name in shown
