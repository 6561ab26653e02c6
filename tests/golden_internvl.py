"""Replays the intern_vit_* and internvl_* cases: InternViT, the query-token wrapper, attention pooling."""

from __future__ import annotations

import torch
from internvl_kernels.models import internvl_14b

from tests.golden_mpt import grad_differences
from tests.golden_qllama import generated, new_tokens
from tests.golden_reader import Case, differences
from tests.golden_registry import Outcome, expect_raise, register

RESIZED = "deviation 2: BEHAVIOUR section 5 item 25, the model runs after resize_pos_embeddings (checked)"


@register("intern_vit_")
def run_vision(case: Case, _impl: str):
    model = internvl_14b.InternVisionModel(internvl_14b.InternVisionConfig(**case.meta["config"])).eval()
    model.load_state_dict(case.weights())
    for call in case.calls():
        name, kwargs, tolerance = call["name"], call["kwargs"], case.tolerance(call)
        if "raises" in call:
            yield expect_raise(name, call, lambda k=kwargs: model(**k))
        elif name == "resize_pos_embeddings":
            model.resize_pos_embeddings(**kwargs)
            problems = differences(
                {"position_embedding": model.embeddings.position_embedding}, call["outputs"], *tolerance
            )
            size, channels = kwargs["new_size"], case.meta["config"].get("num_channels", 3)
            model(torch.zeros(1, channels, size, size))
            yield Outcome(name, problems, RESIZED)
        else:
            outputs = model(**kwargs)
            problems = differences({key: outputs[key] for key in call["outputs"]}, call["outputs"], *tolerance)
            if "grads" in call:
                problems += grad_differences(case, call, model, kwargs, outputs.last_hidden_state)
            yield Outcome(name, problems)


@register("internvl_attnpool")
def run_pooling(case: Case, _impl: str):
    model = internvl_14b.AttentionPoolingBlock(**case.meta["config"]).eval()
    model.load_state_dict(case.weights())
    for call in case.calls():
        got = {"ret": model(**call["kwargs"])}
        yield Outcome(call["name"], differences(got, call["outputs"], *case.tolerance(call)))


@register("internvl_14b")
def run_wrapper(case: Case, _impl: str):
    model = internvl_14b.InternVLModel(internvl_14b.InternVLConfig(**case.meta["config"])).eval()
    model.load_state_dict(case.weights())
    for call in case.calls():
        name, kwargs, tolerance = call["name"], call["kwargs"], case.tolerance(call)
        if "raises" in call:
            yield expect_raise(name, call, lambda c=call: getattr(model, c["method"])(**c["kwargs"]))
            continue
        if call["method"] == "generate":
            yield Outcome(name, differences(generated(model, kwargs), new_tokens(call), *tolerance))
            continue
        result = (model if call["method"] == "forward" else getattr(model, call["method"]))(**kwargs)
        got = named(call["method"], result)
        problems = differences({key: got[key] for key in call["outputs"]}, call["outputs"], *tolerance)
        if "grads" in call:
            problems += grad_differences(case, call, model, kwargs, scalar_of(call, got))
        yield Outcome(name, problems)


def named(method: str, result) -> dict:
    """The parts of a result under the names of the recording."""
    if method == "get_text_features":
        return {"ret": result}
    if method == "get_image_features":
        return {"backbone": result[0], "query_output": result[1]}
    vision, queries = result
    parts = {f"vision_{key}": vision.get(key) for key in ("last_hidden_state", "pooler_output", "hidden_states")}
    return {**parts, "query_output": queries}


def scalar_of(call: dict, got: dict) -> torch.Tensor:
    """The output that the recorded cotangent belongs to: 'sum(X * cotangent)'."""
    return got[call["grad_of"].removeprefix("sum(").split(" ")[0]]
