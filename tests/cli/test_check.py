"""`rgtg-fast check`: it agrees with `generate` on every kind of model, and says why in one line where it refuses."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models.kinds import Kind, all_kinds

SHORT = ("--max-new-tokens", 4, "--temperature", 0)
KINDS = all_kinds()


def test_names_are_unique() -> None:
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names)
    assert all(bool(kind.served) != bool(kind.refused) for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_check_and_generate_agree(run: Callable, tmp_path: Path, kind: Kind) -> None:
    if kind.needs and importlib.util.find_spec(kind.needs) is None:
        pytest.skip(f"{kind.needs} is not installed")
    given = kind.build(tmp_path)
    models = ("--lm", given.lm, "--reward", given.reward, *given.options)
    checked = run("check", *models, "--json")
    answered = run("generate", "How do I learn to swim?", *models, *SHORT, "--json")
    assert checked.code == answered.code, (checked.err, answered.err)
    (report,) = checked.rows
    if kind.refused:
        assert checked.error == answered.error
        assert kind.refused in checked.error
        assert report["reason"] in checked.error
    else:
        assert checked.code == 0, checked.err
        found = report["cached_vs_uncached"]
        assert found["tokens"] > 0
        assert found["logprob"] <= 1e-4
        assert (found["reward"] is None) == (given.reward == "none")
        assert (found["reward"] or 0) <= 1e-4
    assert report["served"] == (checked.code == 0)
