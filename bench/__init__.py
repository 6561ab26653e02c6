"""Benchmarks: ``pytest --benchmark-only bench``. Every timing stands behind a correctness gate."""
