"""Whole models against the same weights with eager and SDPA attention."""

from __future__ import annotations

import pytest

from .conftest import entries


@pytest.mark.parametrize("entry", entries(lambda name: name.startswith("model")))
def test_model(measured, entry):
    row = measured(entry)
    assert row["ours"]["median_ms"] > 0
