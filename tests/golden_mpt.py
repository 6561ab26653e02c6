"""Replays the mpt_* cases: attention functions, attention modules, norms, models, generation, errors."""

from __future__ import annotations

import warnings

import torch
from einops import rearrange
from internvl_kernels.models.mpt import NORM_CLASS_REGISTRY, MPTConfig, MPTForCausalLM, attention
from torch import Tensor

from tests.golden_reader import Case, differences
from tests.golden_registry import FULLY_MASKED, Outcome, expect_raise, register

IMPLS = ("torch", "flash", "triton")
FUNCTIONS = {
    "torch": attention.scaled_multihead_dot_product_attention,
    "flash": attention.flash_attn_fn,
    "triton": attention.triton_flash_attn_fn,
}
ARBITRARY_BIAS = "an arbitrary dense bias; the fused functions refuse it (checked)"
EXTRAPOLATES = (
    "deviation 2: BEHAVIOUR section 5 item 9, ALiBi inputs may be longer than max_seq_len without a dense bias"
)


def rows_layout(past):
    """Cached (k [B, Hkv, hd, T], v [B, Hkv, T, hd]) pairs, nested anyhow, as (k, v) of [B, T, Hkv * hd]."""
    if past is None or len(past) == 0:
        return past
    if isinstance(past[0], Tensor):
        if past[0].dim() == 3:
            return tuple(past)
        return (rearrange(past[0], "b h d t -> b t (h d)"), rearrange(past[1], "b h t d -> b t (h d)"))
    return type(past)(rows_layout(slot) for slot in past)


def seen_rows(batch: int, seqlen_q: int, seqlen_k: int, bias, padding, is_causal: bool) -> Tensor:
    """[B, Sq]: rows with a visible key, from the dense arguments of the original."""
    seen = torch.ones(batch, seqlen_q, seqlen_k, dtype=torch.bool)
    if bias is not None:
        crop = bias[:, :1, -seqlen_q:, -seqlen_k:]
        seen = seen & (crop > torch.finfo(bias.dtype).min)[:, 0]
    if padding is not None:
        seen = seen & padding[:, None, :].bool()
    if is_causal and seqlen_q > 1:
        seen = seen.tril(seqlen_k - seqlen_q)
    return seen.any(2)


def check_rows(name: str, got: Tensor, want: Tensor, rows: Tensor, empty: Tensor, tolerance) -> Outcome:
    """Compare the rows that see a key; the others must hold ``empty`` (the stated deviation)."""
    problems = differences({"output": got}, {"output": want}, *tolerance, rows=rows)
    if bool(rows.all()):
        return Outcome(name, problems)
    unseen = got[~rows]
    if not torch.allclose(unseen, empty.to(unseen.dtype).expand_as(unseen), atol=1e-6):
        problems.append("rows without a visible key do not give 0")
    return Outcome(name, problems, deviation=FULLY_MASKED)


@register("mpt_fn_alibi")
def run_alibi(case: Case, _impl: str):
    for call in case.calls():
        function = getattr(attention, call["method"])
        if "raises" in call:
            yield expect_raise(call["name"], call, lambda f=function, c=call: f(**c["kwargs"]))
        else:
            got = {"ret": function(**call["kwargs"])}
            yield Outcome(call["name"], differences(got, call["outputs"], *case.tolerance(call)))


@register("mpt_fn_sdpa", IMPLS)
def run_functions(case: Case, impl: str):
    for call in case.calls():
        name, kwargs, function = call["name"], call["kwargs"], FUNCTIONS[impl]
        if "raises" in call:
            yield expect_raise(name, call, lambda f=function, k=kwargs: f(**k))
            continue
        if impl == "torch":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the bias-and-padding warning of the original
                out, weights, past = function(**kwargs)
            got = {"out": out, "attn_weights": weights, "past_key_value": past}
            yield Outcome(name, differences(got, call["outputs"], *case.tolerance(call)))
            continue
        kwargs.pop("needs_weights", None)
        bias = kwargs.get("attn_bias")
        if bias is not None and not is_kernel_bias(bias, kwargs["n_heads"]):
            outcome = expect_raise(
                name, {"raises": {"type": "NotImplementedError"}}, lambda f=function, k=kwargs: f(**k)
            )
            yield outcome if outcome.problems else Outcome(name, not_applicable=ARBITRARY_BIAS)
            continue
        if "past_key_value" in kwargs:
            kwargs["past_key_value"] = rows_layout(kwargs["past_key_value"])
        out, _, past = function(**kwargs)
        batch, seqlen_q = kwargs["query"].shape[:2]
        seqlen_k = (past[0] if past else kwargs["key"]).shape[1]
        rows = seen_rows(
            batch, seqlen_q, seqlen_k, bias, kwargs.get("key_padding_mask"), kwargs.get("is_causal", False)
        )
        outcome = check_rows(name, out, call["outputs"]["out"], rows, torch.zeros(()), case.tolerance(call))
        want = rows_layout(call["outputs"]["past_key_value"])
        outcome.problems += differences({"past": past}, {"past": want}, *case.tolerance(call))
        yield outcome


def is_kernel_bias(bias: Tensor, n_heads: int) -> bool:
    """The recorded bias is an ALiBi bias (row form or full), which the fused functions read back."""
    for full in (False, True):
        alibi = attention.build_alibi_bias(n_heads, bias.shape[-1], full, dtype=bias.dtype)
        if bias.shape == alibi.shape and torch.equal(bias, alibi):
            return True
    return False


@register("mpt_attn_", IMPLS)
def run_modules(case: Case, impl: str):
    cls = attention.ATTN_CLASS_REGISTRY[case.meta["construct"]["cls"]]
    module = cls(**{**case.meta["config"], "attn_impl": impl}).eval()
    module.load_state_dict(case.weights())
    for call in case.calls():
        kwargs, want = call["kwargs"], dict(call["outputs"])
        if impl != "torch":
            kwargs.pop("needs_weights", None)
            want.pop("attn_weights", None)
            kwargs["past_key_value"] = rows_layout(kwargs.get("past_key_value"))
            want["past_key_value"] = rows_layout(want["past_key_value"])
        kwargs["x"].requires_grad_("grads" in call)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output, weights, past = module(**kwargs)
        outcome = Outcome(call["name"])
        if impl != "torch":
            seqlen_k = output.shape[1] if not past else past[0].shape[1]
            masks = (kwargs.get("attn_bias"), kwargs.get("attention_mask"), kwargs.get("is_causal", True))
            rows = seen_rows(*output.shape[:2], seqlen_k, *masks)
            empty = module.out_proj.bias.detach()
            outcome = check_rows(call["name"], output, want.pop("output"), rows, empty, case.tolerance(call))
        got = {"output": output, "attn_weights": weights, "past_key_value": past}
        outcome.problems += differences(got, want, *case.tolerance(call))
        if "grads" in call:
            outcome.problems += grad_differences(case, call, module, {"x": kwargs["x"]}, output)
        yield outcome


def grad_differences(case: Case, call: dict, module, inputs: dict[str, Tensor], output: Tensor) -> list[str]:
    """Backpropagate the call's scalar (``output`` is the loss, or weighted by the cotangent) and compare."""
    module.zero_grad(set_to_none=True)
    (output if "cotangent" not in call else (output * call["cotangent"]).sum()).backward()
    parameters = dict(module.named_parameters())
    got = {}
    for key in call["grads"]:
        kind, name = key.split("/", 1)
        got[key] = (inputs if kind == "in" else parameters)[name].grad
    atol, rtol = case.tolerance(call)
    return [f"gradient {problem}" for problem in differences(got, call["grads"], 5 * atol, 5 * rtol)]


@register("mpt_norms")
def run_norms(case: Case, _impl: str):
    for call in case.calls():
        norm = NORM_CLASS_REGISTRY[call["cls"]](**call["init"])
        weights = case.weights(call["name"] + ".") or case.weights(call["cls"] + ".")
        if call["init"].get("weight", True):
            norm.load_state_dict(weights)
        x = call["kwargs"]["x"].requires_grad_("grads" in call)
        output = norm(x)
        problems = differences({"ret": output}, call["outputs"], *case.tolerance(call))
        if "grads" in call:
            call["grads"] = {k.replace(f"w/{call['cls']}.", "w/"): v for k, v in call["grads"].items()}
            problems += grad_differences(case, call, norm, {"x": x}, output)
        yield Outcome(call["name"], problems)


def build_model(config: dict, impl: str) -> MPTForCausalLM:
    """The recorded configuration with another implementation ('flash' is a run-time choice for most configs)."""
    config = {**config}
    if "attn_config" in config:
        config["attn_config"] = {**config["attn_config"], "attn_impl": "torch" if impl == "torch" else "triton"}
    model = MPTForCausalLM(MPTConfig(**config)).eval()
    model.set_attn_impl(impl)
    return model


@register("mpt_lm_", IMPLS)
@register("mpt_transformer_", IMPLS)
@register("mpt_generate_", IMPLS)
def run_models(case: Case, impl: str):
    model = build_model(case.meta["config"], impl)
    model.load_state_dict(case.weights())
    for call in case.calls():
        yield run_model_call(case, call, model, impl)


def run_model_call(case: Case, call: dict, model: MPTForCausalLM, impl: str) -> Outcome:
    name, kwargs, want = call["name"], call["kwargs"], dict(call["outputs"])
    model.train(bool(call.get("train_mode")))
    tolerance = case.tolerance(call)
    if call["method"] == "transformer.wte":
        return Outcome(name, differences({"ret": model.transformer.wte(**kwargs)}, want, *tolerance))
    if call["method"] == "generate":
        with torch.no_grad():
            result = model.generate(**kwargs, return_dict_in_generate=True, output_logits=True)
        steps = len(result.logits)
        got = {
            "sequences": result.sequences,
            "new_tokens": result.sequences[:, -steps:],
            "scores": torch.stack(result.logits, 1),
        }
        return Outcome(name, differences(got, want, *tolerance))
    if impl != "torch":
        kwargs.pop("output_attentions", None)
    rows = kwargs.get(call.get("valid_rows"))
    if impl != "torch" and "past_key_values" in kwargs:
        kwargs["past_key_values"] = rows_layout(kwargs["past_key_values"])
    target = model.transformer if call.get("target") == "transformer" else model
    outputs = target(**kwargs)
    got = {key: outputs[key] for key in want}
    if "past_key_values" in want:  # compared row by row, so that valid_rows applies to caches too
        got["past_key_values"] = rows_layout(got["past_key_values"])
        want["past_key_values"] = rows_layout(want["past_key_values"])
    problems = differences(got, want, *tolerance, rows=rows)
    if "grads" in call:
        problems += grad_differences(case, call, model, {}, outputs.loss)
    return Outcome(name, problems)


@register("mpt_errors", IMPLS)
def run_errors(case: Case, impl: str):
    for call in case.calls():
        name, config = call["name"], call["config"]
        if call["method"] in ("MPTConfig", "MPTForCausalLM"):
            if impl != "torch":  # no attention implementation takes part
                continue

            def build(config=config, method=call["method"]):
                made = MPTConfig(**config)
                return made if method == "MPTConfig" else MPTForCausalLM(made)

            yield expect_raise(name, call, build)
            continue
        model = build_model(config, impl).train(call["train_mode"])
        target = model.transformer if call["target"] == "transformer" else model
        method = target if call["method"] == "forward" else getattr(target, call["method"])
        kwargs = call["kwargs"]
        if impl != "torch" and "past_key_values" in kwargs:
            kwargs["past_key_values"] = rows_layout(kwargs["past_key_values"])
        if name == "too_long" and impl != "torch":
            method(**kwargs)
            yield Outcome(name, deviation=EXTRAPOLATES)
            continue
        yield expect_raise(name, call, lambda m=method, k=kwargs: m(**k))
