"""Original import paths for scripts that keep them: ``llava.model.language_model.mpt.attention`` and the others.

    from internvl_kernels.models import compat

    compat.install()
    from llava.model.language_model.mpt.attention import MultiheadAttention  # this package's

Nothing happens without the call, ``uninstall`` takes it back, and an installed ``llava`` package is never hidden.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

_ROOT = "llava"
_OURS = __name__.rpartition(".")[0]  # internvl_kernels.models
_ENCODER, _LANGUAGE = "llava.model.multimodal_encoder", "llava.model.language_model"
_MPT = ("attention", "blocks", "configuration_mpt", "custom_embedding", "modeling_mpt", "norm", "param_init_fns")
_INTERN = ("configuration_intern_vit", "modeling_intern_vit")

# original module -> module of this package that holds its names
MODULES = {
    "llava.constants": "llava.constants",
    "llava.mm_utils": "llava.prompt",
    "llava.model.llava_arch": "llava.meta",
    f"{_LANGUAGE}.llava_llama": "llava.llava_llama",
    f"{_LANGUAGE}.llava_mpt": "llava.llava_mpt",
    **{f"{_LANGUAGE}.mpt.{name}": f"mpt.{name}" for name in _MPT},
    f"{_LANGUAGE}.mpt.hf_prefixlm_converter": "prefix_lm",
    "llava.model.multimodal_projector.builder": "llava.projector",
    f"{_ENCODER}.builder": "llava.tower_builder",
    f"{_ENCODER}.clip_encoder": "llava.vision_tower",
    **{f"{_ENCODER}.intern_vit_6b.{name}": f"internvl_14b.{name}" for name in _INTERN},
    **{f"{_ENCODER}.internvl_14b.{name}": f"internvl_14b.{name}" for name in _INTERN},
    f"{_ENCODER}.internvl_14b.configuration_internvl": "internvl_14b.configuration_internvl",
    f"{_ENCODER}.internvl_14b.modeling_internvl": "internvl_14b.modeling_internvl",
    f"{_ENCODER}.internvl_14b.modeling_qllama": "qllama.modeling_qllama",
}
# original package -> package of this package whose names it offers itself
PACKAGES = {
    "llava": "llava",
    "llava.model": "llava",
    _LANGUAGE: None,
    f"{_LANGUAGE}.mpt": "mpt",
    "llava.model.multimodal_projector": None,
    _ENCODER: None,
    f"{_ENCODER}.intern_vit_6b": "internvl_14b",
    f"{_ENCODER}.internvl_14b": "internvl_14b",
}

_installed: dict[str, ModuleType] = {}


class Installation:
    """Returned by ``install``; as a context manager it takes the paths back at its end."""

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *_) -> None:
        uninstall()


def install() -> Installation:
    """Make the original import paths lead to this package; a second call changes nothing.

    Raises: ImportError when another ``llava`` package is imported or installed.
    """
    if _installed:
        return Installation()
    found = _other_llava()
    if found is not None:
        raise ImportError(
            f"compat.install: a package named {_ROOT!r} is there already ({found}) and is not hidden; uninstall it, or "
            f"import from {_OURS} instead"
        )
    for name, source in PACKAGES.items():
        _installed[name] = _package(name, source)
    for name, source in MODULES.items():
        _installed[name] = importlib.import_module(f"{_OURS}.{source}")
    for name, module in _installed.items():
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(_installed[parent], child, module)
    return Installation()


def uninstall() -> None:
    """Remove what ``install`` added; names already imported stay usable."""
    for name, module in _installed.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    _installed.clear()


def _other_llava() -> str | None:
    """Where another ``llava`` comes from, or None."""
    module = sys.modules.get(_ROOT)
    if module is not None:
        return getattr(module, "__file__", None) or repr(module)
    spec = importlib.util.find_spec(_ROOT)
    if spec is None:
        return None
    return spec.origin or ", ".join(spec.submodule_search_locations or ())


def _package(name: str, source: str | None) -> ModuleType:
    """A package without files of its own, holding the public names of ``source``."""
    package = ModuleType(name, f"Original import path; see {__name__}.")
    package.__path__ = []
    if source is not None:
        offered = importlib.import_module(f"{_OURS}.{source}")
        package.__dict__.update({public: getattr(offered, public) for public in offered.__all__})
        package.__all__ = list(offered.__all__)
    return package
