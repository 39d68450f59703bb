"""One undisturbed run that the others are compared with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import harness  # noqa: E402


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete generational run that nobody hurt."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, out, err = harness.search(harness.write_config(folder), folder / "run")
    assert code == 0, err
    assert "Pareto front" in out
    return folder / "run"
