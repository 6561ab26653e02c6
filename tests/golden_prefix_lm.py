"""Replays the prefix_* cases: converted models, their generation, the masks of batches."""

from __future__ import annotations

import torch
import transformers
from internvl_kernels.models.prefix_lm import (
    add_bidirectional_mask_if_missing,
    convert_hf_causal_lm_to_prefix_lm,
)
from internvl_kernels.models.prefix_lm.families import bloom_alibi

from tests.golden_reader import Case, differences
from tests.golden_registry import Outcome, expect_raise, register

UNKNOWN_KEYWORD = "BLOOM of transformers 5 takes any keyword, so that its converted model does, too"
TABLES = (".attn.bias", ".attention.bias", ".masked_bias", ".inv_freq", ".attn.attention.bias")


def build(case: Case):
    """The model of a case with its weights, in eager mode, converted."""
    construct = case.meta["construct"]
    config = getattr(transformers, construct["config_cls"])(**case.meta["config"])
    model = getattr(transformers, construct["cls"])._from_config(config, attn_implementation="eager")
    expected = model.state_dict()
    weights = {}
    for key, value in case.weights().items():
        key = "lm_head.weight" if key == "embed_out.weight" and key not in expected else key
        if key in expected or not key.endswith(TABLES):
            weights[key] = value
    missing = set(expected) - set(weights) - {k for k in expected if k.endswith(TABLES)}
    assert not missing and set(weights) <= set(expected), (missing, set(weights) - set(expected))
    model.load_state_dict(weights, strict=False)
    return convert_hf_causal_lm_to_prefix_lm(model.eval())


def state_key(model, key: str) -> str:
    return "lm_head.weight" if key == "embed_out.weight" and key not in dict(model.named_parameters()) else key


def run_forward(model, case: Case, call: dict, caches: dict, index: int) -> Outcome:
    kwargs, outputs = call["kwargs"], dict(call["outputs"])
    if "past_from_call" in call:
        kwargs["past_key_values"] = caches[call["past_from_call"]]
    model.zero_grad()
    with torch.set_grad_enabled("grads" in call):
        got = model(**kwargs)
    caches[index] = got.get("past_key_values")
    cached = outputs.pop("past_key_values", None) is not None
    rows = call["kwargs"][call["valid_rows"]] if "valid_rows" in call else None
    atol, rtol = case.tolerance(call)
    problems = differences({k: got[k] for k in outputs if k in got}, outputs, atol, rtol, rows=rows)
    if cached and caches[index] is None:
        problems.append("no cache was returned")
    if "grads" in call:
        got.loss.backward()
        grads = {k: model.get_parameter(state_key(model, k[2:])).grad for k in call["grads"]}
        problems += differences(grads, call["grads"], 5 * atol, 5 * rtol)
    return Outcome(call["name"], problems)


def run_generate(model, case: Case, call: dict) -> Outcome:
    kwargs = {**call["kwargs"], "return_dict_in_generate": True, "output_logits": True}
    prompt = kwargs["input_ids"].shape[1]
    out = model.generate(**kwargs)
    got = {"sequences": out.sequences, "new_tokens": out.sequences[:, prompt:], "scores": torch.stack(out.logits, 1)}
    return Outcome(call["name"], differences(got, call["outputs"], *case.tolerance(call)))


@register("prefix_")
def run_family(case: Case, _impl: str):
    model, caches = build(case), {}
    for index, call in enumerate(case.calls()):
        name, kwargs = call["name"], call["kwargs"]
        if name == "unexpected_kw" and transformers.__version__ >= "5":
            model(**kwargs)
            yield Outcome(name, deviation=UNKNOWN_KEYWORD)
        elif "raises" in call:
            yield expect_raise(name, call, lambda k=kwargs: model(**k))
        elif call["method"] == "transformer._build_alibi_tensor":
            sizes = (kwargs["batch_size"], kwargs["query_length"], kwargs["key_length"])
            got = {"ret": bloom_alibi(model.config.n_head, *sizes, kwargs["dtype"], kwargs["device"])}
            yield Outcome(name, differences(got, call["outputs"], *case.tolerance(call)))
        elif call["method"] == "generate":
            yield run_generate(model, case, call)
        else:
            yield run_forward(model, case, call, caches, index)


@register("prefix_add_mask")
def run_add_mask(case: Case, _impl: str):
    for call in case.calls():
        batch = call["kwargs"]["batch"]
        if "raises" in call:
            yield expect_raise(call["name"], call, lambda b=batch: add_bidirectional_mask_if_missing(b))
            continue
        returned = add_bidirectional_mask_if_missing(batch)
        problems = differences({"batch": batch}, call["outputs"], *case.tolerance(call))
        if returned is not None or set(batch) != set(call["outputs"]["batch"]):
            problems.append(f"returned {returned!r}, keys {sorted(batch)}")
        yield Outcome(call["name"], problems)


@register("prefix_misc")
def run_misc(case: Case, _impl: str):
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11, "n_positions": 8}
    for call in case.calls():
        if call["name"] == "idempotent":
            model = convert_hf_causal_lm_to_prefix_lm(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)))
            forward = type(model).forward
            same = convert_hf_causal_lm_to_prefix_lm(model) is model
            kept = {"forward_unchanged": type(model).forward is forward, "flag": model._prefix_lm_converted}
            got = {"same_object": same, **kept}
            yield Outcome(call["name"], differences(got, call["outputs"], *case.tolerance(call)))
            continue
        if call["name"] == "unsupported":
            fields = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
            model = transformers.BertForMaskedLM(transformers.BertConfig(**fields, vocab_size=11))
        else:
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, add_cross_attention=True))
        yield expect_raise(call["name"], call, lambda m=model: convert_hf_causal_lm_to_prefix_lm(m))
