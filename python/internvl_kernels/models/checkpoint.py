"""Loading that never leaves a parameter at random: a checkpoint fits the model key for key, or says what does not."""

from __future__ import annotations

import re

from safetensors import SafetensorError

_SHOWN = 4  # keys named in an error; the rest is counted


class CheckedLoading:
    """Mixin before ``PreTrainedModel``: ``from_pretrained`` raises where transformers would warn and go on."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        strict: bool = True,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """As in transformers, but a checkpoint that does not fit is an error.

        Args:
            strict: False allows missing keys, whose parameters are initialised, and keys that the model lacks.
            ignore_mismatched_sizes: True leaves the parameters of misshapen keys at their initial values.
        Raises: ValueError (unreadable file; missing, unexpected or misshapen keys).
        """
        model, info = cls._load(pretrained_model_name_or_path, *args, **kwargs)
        checked = info if strict else {**info, "missing_keys": (), "unexpected_keys": ()}
        problems = loading_problems(checked, model, tolerate_shapes=bool(kwargs.get("ignore_mismatched_sizes")))
        if problems:
            raise ValueError(f"the checkpoint {str(pretrained_model_name_or_path)!r} does not fit {cls.__name__}: "
                             + "; ".join(problems))  # fmt: skip
        return (model, info) if output_loading_info else model

    @classmethod
    def _load(cls, name, *args, **kwargs):
        """transformers' own loading, with (key, found, expected) of misshapen keys instead of its RuntimeError."""
        options = {**kwargs, "ignore_mismatched_sizes": True, "output_loading_info": True}
        try:
            return super().from_pretrained(name, *args, **options)
        except SafetensorError as error:
            raise ValueError(f"the checkpoint {str(name)!r} has an unreadable file: {error}") from error


def loading_problems(info: dict, model=None, *, tolerate_shapes: bool = False) -> list[str]:
    """One phrase for each kind of disagreement in transformers' loading information."""
    problems = []
    if info["missing_keys"]:
        problems.append(_listed("missing", sorted(info["missing_keys"])))
    if info["unexpected_keys"]:
        problems.append(_listed("not part of the model", sorted(info["unexpected_keys"])))
    if info["mismatched_keys"] and not tolerate_shapes:
        shapes = [_misshapen(entry, model) for entry in info["mismatched_keys"]]
        problems.append(_listed("misshapen", sorted(shapes)))
    if info.get("error_msgs"):
        problems.append(_listed("errors", [re.sub(r"\s+", " ", str(m)) for m in info["error_msgs"]]))
    return problems


def _misshapen(entry, model) -> str:
    if isinstance(entry, str):  # transformers 4 names the key only
        parameter = None if model is None else model.state_dict().get(entry)
        return entry if parameter is None else f"{entry}, expected {list(parameter.shape)}"
    key, found, wanted = entry
    return f"{key} {list(found)}, expected {list(wanted)}"


def _listed(what: str, items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{len(items)} {what} ({', '.join(items[:_SHOWN])}{more})"
