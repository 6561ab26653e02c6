"""Random initialisation for training from scratch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from .norm import NORM_CLASS_REGISTRY

Scheme = Callable[[Tensor], object]


def _kaiming(init: Callable, config) -> Scheme:
    options = config.init_config
    return partial(init, a=options["init_gain"], mode=options["fan_mode"], nonlinearity=options["init_nonlinearity"])


def _normal(std: float) -> Scheme:
    return partial(nn.init.normal_, mean=0.0, std=std)


def _baseline(config) -> Scheme:
    std = config.init_config["init_std"]
    if std is None:
        raise ValueError("init_config['init_std'] is None; 'baseline_' needs a standard deviation")
    return _normal(std)


MODEL_INIT_REGISTRY: dict[str, Callable[..., Scheme] | None] = {
    "default_": None,  # torch's own reset_parameters
    "baseline_": _baseline,
    "small_init_": lambda config: _normal(math.sqrt(2 / (5 * config.d_model))),
    "neox_init_": lambda config: _normal(math.sqrt(2 / (5 * config.d_model))),
    "kaiming_uniform_": partial(_kaiming, nn.init.kaiming_uniform_),
    "kaiming_normal_": partial(_kaiming, nn.init.kaiming_normal_),
    "xavier_uniform_": lambda config: partial(nn.init.xavier_uniform_, gain=config.init_config["init_gain"]),
    "xavier_normal_": lambda config: partial(nn.init.xavier_normal_, gain=config.init_config["init_gain"]),
}


def init_module(module: nn.Module, config) -> None:
    """Initialise the parameters that ``module`` itself owns by the scheme of ``config.init_config``.

    Parameters that a checkpoint already filled (transformers marks them) are left alone.
    Raises: ValueError (unknown scheme, bad limits).
    """
    name = config.init_config["name"]
    if name not in MODEL_INIT_REGISTRY:
        raise ValueError(f"init_config['name'] is {name!r}; allowed: {', '.join(map(repr, MODEL_INIT_REGISTRY))}")
    if name == "default_":
        if not _filled(module) and hasattr(module, "reset_parameters"):
            module.reset_parameters()
        return
    scheme = MODEL_INIT_REGISTRY[name](config)
    if isinstance(module, nn.Linear):
        _init_linear(module, scheme, _residual_divisor(config))
    elif isinstance(module, nn.Embedding):
        _apply(module.weight, _embedding_scheme(config) or scheme)
    elif isinstance(module, tuple(NORM_CLASS_REGISTRY.values())):
        _apply(module.weight, nn.init.ones_)
        _apply(getattr(module, "bias", None), nn.init.zeros_)


def _init_linear(module: nn.Linear, scheme: Scheme, divisor: float) -> None:
    dim, splits = getattr(module, "_fused", (0, ()))
    if not getattr(module.weight, "_is_hf_initialized", False):
        bounds = (0, *splits, module.weight.shape[dim])
        with torch.no_grad():
            for begin, end in pairwise(bounds):
                scheme(module.weight.narrow(dim, begin, end - begin))  # the fans of one projection, not of all
            if getattr(module, "_is_residual", False):
                module.weight.div_(divisor)
    _apply(module.bias, nn.init.zeros_)


def _apply(parameter: Tensor | None, init: Scheme) -> None:
    if parameter is not None and not getattr(parameter, "_is_hf_initialized", False):
        with torch.no_grad():
            init(parameter)


def _filled(module: nn.Module) -> bool:
    return any(getattr(p, "_is_hf_initialized", False) for p in module.parameters(recurse=False))


def _residual_divisor(config) -> float:
    """What the weights that write into the residual stream are divided by."""
    if config.init_config["name"] == "neox_init_":
        return config.n_layers / math.sqrt(10)
    setting = config.init_config["init_div_is_residual"]
    if setting is False:
        return 1.0
    if setting is True:
        return math.sqrt(2 * config.n_layers)
    try:
        return float(setting)
    except (TypeError, ValueError):
        raise ValueError(f"init_config['init_div_is_residual'] is {setting!r}; allowed: a bool or a number") from None


def _embedding_scheme(config) -> Scheme | None:
    std, limits = config.init_config["emb_init_std"], config.init_config["emb_init_uniform_lim"]
    if std is not None:
        return _normal(std)
    if limits is None:
        return None
    if not isinstance(limits, Sequence):
        limits = (-limits, limits)
    if len(limits) != 2:
        raise ValueError(f"init_config['emb_init_uniform_lim'] is {limits!r}; allowed: a number or [low, high]")
    return partial(nn.init.uniform_, a=limits[0], b=limits[1])
