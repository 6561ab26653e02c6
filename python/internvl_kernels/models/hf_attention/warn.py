"""One warning for each reason, however many layers and steps meet it."""

from __future__ import annotations

import warnings

_given: set[str] = set()


def warn_once(reason: str, message: str) -> None:
    """Warn, the first time ``reason`` is named in this process."""
    if reason not in _given:
        _given.add(reason)
        warnings.warn(message, stacklevel=3)


def forget() -> None:
    """Let every warning be given again (for tests)."""
    _given.clear()
