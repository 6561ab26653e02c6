"""The class of a converted model: its own class with ``bidirectional_mask`` in front of it."""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache

from .carriers import cache_sizes, carrier_of, check_bidirectional_mask, packed_segments
from .families import family_of
from .layers import install
from .prompt import check_generation, check_prompt_mask, full_cache, has_window, prompt_length, prompt_mask, setting


class PrefixLM:
    """Mixin in front of a causal-LM class; ``prefix_class`` makes the combination.

    Nothing is kept between calls: the mask travels through the arguments.
    """

    _prefix_lm_base: type
    _prefix_lm_converted = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        install(self)

    @property
    def _original_forward(self):
        """forward of the unconverted class, bound."""
        return functools.partial(self._prefix_lm_base.forward, self)

    @property
    def _original_generate(self):
        """generate of the unconverted class, bound: causal throughout."""
        return functools.partial(self._prefix_lm_base.generate, self)

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config=None,
        *args,
        bidirectional_mask: Tensor | None = None,
        **kwargs,
    ):
        """As ``GenerationMixin.generate``, with the prompt as the prefix; new tokens see the prompt and each other.

        bidirectional_mask: [B, prompt] bool or int. Default: attention_mask, else every token that is not padding.
        Raises: TypeError, ValueError (the mask, chunked prefill, a cache that drops old keys, an assistant that was
        not converted).
        """
        kwargs["generation_config"] = generation_config
        check_generation(self, kwargs)
        if bidirectional_mask is None:
            bidirectional_mask = prompt_mask(self, inputs, kwargs)
        else:
            check_prompt_mask(self, bidirectional_mask, inputs, kwargs)
        cached = setting(self, kwargs, "use_cache") is not False
        if has_window(self.config) and cached and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = full_cache(self, kwargs, prompt_length(inputs, kwargs))
            kwargs["cache_implementation"] = None  # done
        if bidirectional_mask is not None:
            kwargs["bidirectional_mask"] = bidirectional_mask
        return super().generate(inputs, kwargs.pop("generation_config"), *args, **kwargs)

    def generate_batch(self, *args, **kwargs):
        """Raises NotImplementedError: continuous batching knows causal masks only."""
        raise NotImplementedError("generate_batch has no prefix masks; use generate")

    def prepare_inputs_for_generation(
        self,
        input_ids,
        *args,
        attention_mask: Tensor | None = None,
        bidirectional_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ):
        """As in the base class, but the masks stay [B, keys]: ``forward`` makes the carrier of them."""
        kwargs["inputs_embeds"] = inputs_embeds  # named above because generate looks for the name
        prepare = super().prepare_inputs_for_generation
        if bidirectional_mask is None:
            return prepare(input_ids, *args, attention_mask=attention_mask, **kwargs)
        if attention_mask is not None:
            takes_positions = "position_ids" in inspect.signature(self.forward).parameters
            if takes_positions and kwargs.get("position_ids") is None:  # transformers 4
                positions = attention_mask.long().cumsum(-1) - 1
                kwargs["position_ids"] = positions.masked_fill_(attention_mask == 0, 1)
            missing = attention_mask.shape[1] - bidirectional_mask.shape[1]
            if missing > 0:
                bidirectional_mask = torch.nn.functional.pad(bidirectional_mask, (0, missing))
        if family_of(type(self)).same_shape:  # BLOOM's own pads the mask for its ALiBi tensor
            prepare = functools.partial(GenerationMixin.prepare_inputs_for_generation, self)
        # a mask of four dimensions: no causal one is built from it
        dummy = input_ids.new_ones(1, 1, 1, 1)
        prepared = prepare(input_ids, *args, attention_mask=dummy, **kwargs)
        prepared["attention_mask"] = attention_mask
        prepared["bidirectional_mask"] = bidirectional_mask
        return prepared

    def __reduce_ex__(self, protocol):
        """Copies and pickles name the base class: the class of ``self`` is made on demand."""
        _, _, *state = super().__reduce_ex__(protocol)
        return (_new, (self._prefix_lm_base,), *state)


def _new(base: type) -> PrefixLM:
    combined = prefix_class(base)
    return combined.__new__(combined)


@functools.cache
def prefix_class(base: type) -> type:
    """The converted counterpart of a causal-LM class; it keeps the name, which transformers looks at in places."""
    base_forward = base.forward
    signature = inspect.signature(base_forward)

    @functools.wraps(base_forward)
    def forward(self, *args, bidirectional_mask: Tensor | None = None, **kwargs):
        if bidirectional_mask is None:
            return base_forward(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        put_carrier(self, bound, bidirectional_mask)
        return base_forward(*bound.args, **bound.kwargs)

    parameters = list(signature.parameters.values())
    last = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    extra = inspect.Parameter("bidirectional_mask", inspect.Parameter.KEYWORD_ONLY, default=None)
    forward.__signature__ = signature.replace(parameters=[*parameters[:last], extra, *parameters[last:]])
    members = {
        "forward": forward,
        "_prefix_lm_base": base,
        "__module__": __name__,
        "__qualname__": f"prefix_class({base.__name__})",
        "__doc__": f"``{base.__name__}`` as a prefix LM: ``forward`` takes ``bidirectional_mask``.",
    }
    return type(base.__name__, (PrefixLM, base), members)


def put_carrier(model: PrefixLM, bound: inspect.BoundArguments, bidirectional_mask: Tensor) -> None:
    """Replace attention_mask by the carrier of both masks, and fill in what the model would derive from the old one.

    Raises: TypeError, ValueError (masks, cache).
    """
    given, family = bound.arguments, family_of(type(model))
    x = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    if x is None:
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    past, attention_mask = given.get("past_key_values"), given.get("attention_mask")
    check_bidirectional_mask(bidirectional_mask, x.shape[0], model.config)
    extra = next(
        (v for k, v in given.items() if bound.signature.parameters[k].kind is inspect.Parameter.VAR_KEYWORD), {}
    )
    wanted = given.get("output_attentions", extra.get("output_attentions"))
    weights = model.config.output_attentions if wanted is None else wanted
    segments = None
    position_ids = given.get("position_ids", extra.get("position_ids"))
    if position_ids is not None and position_ids.dim() == 2 and attention_mask is None and past is None:
        segments = packed_segments(position_ids.to(x.device), x.shape[0])
    if not family.takes_positions:
        extra.pop("position_ids", None)
    carrier = carrier_of(
        bidirectional_mask, attention_mask, past, x.shape[1], x.device, segments, family.same_shape, bool(weights)
    )
    if family.positions_from_mask and given.get("position_ids") is None:
        given["position_ids"] = _real_positions(attention_mask, int(cache_sizes(past, 0)[0]), x)
    use_cache = given.get("use_cache")
    cached = model.config.use_cache if use_cache is None else use_cache
    if past is None and cached and has_window(model.config) and not model.training:
        given["past_key_values"] = DynamicCache()
    given["attention_mask"] = carrier


def _real_positions(attention_mask: Tensor | None, seen: int, x: Tensor) -> Tensor:
    """int64 [B, Sq]: how many real tokens come before each; padding: -1."""
    if attention_mask is None:
        return torch.arange(seen, seen + x.shape[1], device=x.device).expand(x.shape[0], -1)
    real = (attention_mask != 0).long()
    return (real.cumsum(1) * real - 1)[:, seen : seen + x.shape[1]]
