"""Tests that need Triton's interpreter; ``tests/test_triton.py`` runs them with TRITON_INTERPRET=1, in processes of
their own, since Triton reads it when it is imported. Elsewhere nothing here is collected."""

import inspect
import warnings

import pytest
from internvl_kernels import variables

if variables.triton_interpret():
    interpreter = pytest.importorskip("triton.runtime.interpreter")
else:
    collect_ignore_glob = ["test_*.py"]


class _Nothing:
    def restore(self):
        pass


def _patch_once(patch, language):
    """The interpreter patches Triton's language anew at each call of a device function: two thirds of its time.

    Once per launch is enough; ``patched`` holds the modules that the running launch has seen.
    """
    patched = set()

    def patch_lang(fn):
        modules = {m for m in (language, language.core) if any(m is v for v in fn.__globals__.values())}
        if patched and modules <= patched:
            return _Nothing()
        outermost = not patched
        scope = patch(fn)
        patched.update(modules)
        if outermost:
            restore = scope.restore

            def restore_all():
                patched.clear()
                restore()

            scope.restore = restore_all
        return scope

    return patch_lang


if variables.triton_interpret() and inspect.isfunction(getattr(interpreter, "_patch_lang", None)):
    interpreter._patch_lang = _patch_once(interpreter._patch_lang, interpreter.tl)


@pytest.fixture(autouse=True)
def _quiet():
    """numpy warns of what the hardware does silently: inf - inf is NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
