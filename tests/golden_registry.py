"""Who replays which cases of the golden bank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.golden_reader import Case

FULLY_MASKED = (
    "deviation 1: rows without a visible key give 0, the original attends uniformly there; all other rows were compared"
)


@dataclass
class Outcome:
    """What became of one call.

    problems: differences beyond the tolerance. deviation: the reason, when the call differs on purpose.
    not_applicable: why the implementation cannot take this call at all (it is not counted as compared).
    """

    call: str
    problems: list[str] = field(default_factory=list)
    deviation: str | None = None
    not_applicable: str | None = None


@dataclass(frozen=True)
class Runner:
    """``run(case, impl)`` yields an Outcome per call, for every impl of ``impls`` (("any",): it has no choice)."""

    run: Callable[[Case, str], Iterator[Outcome]]
    impls: tuple[str, ...]


RUNNERS: dict[str, Runner] = {}


def register(prefix: str, impls: tuple[str, ...] = ("any",)):
    """Decorator: replay the cases whose id starts with ``prefix``; the longest registered prefix wins."""

    def add(run):
        RUNNERS[prefix] = Runner(run, impls)
        return run

    return add


def runner_for(case_id: str) -> Runner | None:
    """The runner of a case, or None."""
    prefixes = [prefix for prefix in RUNNERS if case_id.startswith(prefix)]
    return RUNNERS[max(prefixes, key=len)] if prefixes else None


def expect_raise(name: str, call: dict, action: Callable[[], object]) -> Outcome:
    """Run ``action``; only the exception's type is compared."""
    wanted = call["raises"]["type"]
    try:
        action()
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        return Outcome(name, [] if wanted in kinds else [f"raised {error!r}; recorded {wanted}"])
    return Outcome(name, [f"raised nothing; recorded {wanted}"])
