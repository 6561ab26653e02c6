"""Replays the qllama_* cases: parts, the inner model, caches, the language model, generation."""

from __future__ import annotations

import torch
from internvl_kernels.models import qllama
from transformers.cache_utils import Cache

from tests.golden_mpt import grad_differences
from tests.golden_reader import Case, differences
from tests.golden_registry import FULLY_MASKED, Outcome, expect_raise, register

NAMED_ERROR = "deviation 2: the original's RuntimeError from inside is a ValueError that names the batch sizes"
CHUNK = (
    "deviation 2: BEHAVIOUR section 5 item 20, cross attention never sees the self-attention cache; a query block that "
    "begins in the cache is a ValueError"
)
QUERY_COUNT = "deviation 2: BEHAVIOUR section 5 item 19, cross attention follows config.num_query_token"


def pairs(past):
    """A cache as the original's tuple of (k, v) per layer."""
    if isinstance(past, Cache):
        return tuple((layer.keys, layer.values) for layer in past.layers)
    return past


@register("qllama_parts")
def run_parts(case: Case, _impl: str):
    rotary = None
    for call in case.calls():
        kwargs, method, name = call["kwargs"], call["method"], call["name"]
        if method == "LlamaRotaryEmbedding.forward":
            rotary = rotary or qllama.LlamaRotaryEmbedding(**call["init"])
            got = dict(zip(("cos", "sin"), rotary(**kwargs), strict=True))
        elif method == "apply_rotary_pos_emb":
            got = dict(zip(("q", "k"), qllama.apply_rotary_pos_emb(**kwargs), strict=True))
        elif method == "LlamaRMSNorm.forward":
            got = {"ret": norm_of(case, call)(kwargs["x"])}
        else:
            got = {"ret": getattr(qllama, method)(**kwargs)}
        yield Outcome(name, differences(got, call["outputs"], *case.tolerance(call)))


def norm_of(case: Case, call: dict) -> qllama.LlamaRMSNorm:
    norm = qllama.LlamaRMSNorm(**call["init"])
    norm.load_state_dict(case.weights("rms."))
    return norm.half() if call["name"] == "rms_half_weight" else norm


@register("qllama_")
def run_models(case: Case, _impl: str):
    model = qllama.LlamaForCausalLM(qllama.QLlamaConfig(**case.meta["config"])).eval()
    model.load_state_dict(case.weights())
    results = []
    for call in case.calls():
        yield run_call(case, call, model, results)


def run_call(case: Case, call: dict, model: qllama.LlamaForCausalLM, results: list) -> Outcome:
    name, kwargs, tolerance = call["name"], call["kwargs"], case.tolerance(call)
    results.append(None)
    if call["method"] == "generate":
        return Outcome(name, differences(generated(model, kwargs), new_tokens(call), *tolerance))
    if "past_from_call" in call:
        kwargs["past_key_values"] = pairs(results[call["past_from_call"]])
    model.train(bool(call.get("train_mode")))
    model.model.gradient_checkpointing = "gradient_checkpointing=True" in call.get("quirk", "")
    target = model.model if call.get("target") == "model" else model
    method = target if call["method"] == "forward" else getattr(target, call["method"])
    if "raises" in call:
        if call["raises"]["type"] == "RuntimeError":
            outcome = expect_raise(name, {"raises": {"type": "ValueError"}}, lambda: method(**kwargs))
            outcome.deviation = NAMED_ERROR
            return outcome
        return expect_raise(name, call, lambda: method(**kwargs))
    if call.get("quirk") == "cross_attn_uses_self_attn_past":
        outcome = expect_raise(name, {"raises": {"type": "ValueError"}}, lambda: method(**kwargs))
        outcome.deviation = CHUNK
        return outcome
    for key in call.get("grads", {}):
        if key.startswith("in/"):
            kwargs[key[3:]].requires_grad_()
    outputs = method(**kwargs)
    results[-1] = outputs.get("past_key_values")
    want, rows, deviation = dict(call["outputs"]), kwargs.get(call.get("valid_rows")), None
    if case.id == "qllama_quirk_num_query_token":
        return Outcome(name, constant_query_count(model.model, kwargs, want, tolerance), QUERY_COUNT)
    if call.get("fully_masked_rows"):
        rows, deviation = kwargs["attention_mask"].cumsum(1) > 0, FULLY_MASKED
    got = {key: pairs(outputs[key]) for key in want}
    if "past_key_values" in want:  # [B, H, T, D] as [B, T, H, D], so that valid_rows applies to caches too
        got["past_key_values"], want["past_key_values"] = (
            [[t.transpose(1, 2) for t in pair] for pair in past["past_key_values"]] for past in (got, want)
        )
    problems = differences(got, want, *tolerance, rows=rows)
    if "grads" in call:
        scalar = outputs.last_hidden_state if "cotangent" in call else outputs.loss
        problems += grad_differences(case, call, model, kwargs, scalar)
    return Outcome(name, problems, deviation)


def constant_query_count(inner: qllama.LlamaModel, kwargs: dict, want: dict, tolerance) -> list[str]:
    """The original counts 10 tokens for the mask and 96 for cross attention: asked for that, we give its numbers."""
    embeds, vision, config = kwargs["inputs_embeds"], kwargs["vision_hidden_states"], inner.config
    batch, seqlen = embeds.shape[:2]
    mask = qllama._make_causal_mask((batch, seqlen), embeds.dtype, embeds.device).clone()
    mask[:, :, : config.num_query_token, : config.num_query_token] = 0
    own, config.num_query_token = config.num_query_token, 96
    try:
        outputs = inner.forward_train(inputs_embeds=embeds, attention_mask=mask, vision_hidden_states=vision)
    finally:
        config.num_query_token = own
    return differences({key: outputs[key] for key in want}, want, *tolerance)


def generated(model, kwargs: dict, **more) -> dict:
    """New tokens and the logits of each step; ``model`` generates from embeddings or from ids."""
    with torch.no_grad():
        result = model.generate(**kwargs, **more, return_dict_in_generate=True, output_logits=True)
    steps = len(result.logits)
    return {"new_tokens": result.sequences[:, -steps:], "scores": torch.stack(result.logits, 1)}


def new_tokens(call: dict) -> dict:
    """What is compared of a recorded generation: its sequences begin with a column that old transformers inserted."""
    return {key: call["outputs"][key] for key in ("new_tokens", "scores")}
