"""clip_qk_layernorm against clamp, split and two layer norms, under the copy ceiling."""

from __future__ import annotations

import pytest

from .conftest import entries


@pytest.mark.parametrize("entry", entries(lambda name: name.startswith("norm")))
def test_clip_qk_layernorm(measured, entry):
    row = measured(entry)
    assert row["ours"]["median_ms"] > 0
