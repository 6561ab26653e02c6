"""Replays the llava_* cases and the projectors."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from internvl_kernels.models.llava import (
    LlavaConfig,
    LlavaLlamaForCausalLM,
    LlavaMptConfig,
    LlavaMptForCausalLM,
    build_vision_projector,
)
from transformers.cache_utils import DynamicCache

from tests.golden_reader import Case, differences
from tests.golden_registry import Outcome, expect_raise, register

VALUE_ERROR = "deviation 2: bad input raises ValueError and names sample and figure; the original raises {}"
BETTER = {
    "mask_without_labels_fails": "deviation 2: BEHAVIOUR section 5 item 28, unequal lengths need no labels",
    "embeds_argument_is_ignored": "deviation 2: BEHAVIOUR section 5 item 30, inputs_embeds is read",
    "image_at_zero_quirk": "deviation 2: BEHAVIOUR section 5 item 30, an image at position 0 is fused like any other",
    "tower_num_patches": "deviation 2: BEHAVIOUR section 5 item 34, num_patches counts patches and queries",
}


class Tokenizer:
    """What ``initialize_vision_tokenizer`` needs of one."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def add_tokens(self, tokens, special_tokens=False) -> int:
        self.size += len(tokens)
        return len(tokens)


def tower_config(tower: dict) -> dict:
    """The recorded tower with the ``model_type`` that chooses its class."""
    kinds = {"CLIP": "clip_vision_model", "InternVision": "intern_vit_6b", "InternVL": "internvl"}
    return {"model_type": next(v for k, v in kinds.items() if tower["kind"].startswith(k)), **tower["config"]}


def build(case: Case, impl: str):
    config = case.meta["config"]
    # the recorded label rule of <start> and <end>, which this package only follows when asked
    fields = {**config["llm_config"], **config["mm"], "mm_vision_config": tower_config(config["tower"])}
    fields["mm_end_label_of_image"] = True
    if config["llm"] == "llama":
        model = LlavaLlamaForCausalLM(LlavaConfig(attn_implementation=impl, **fields))
    else:
        model = LlavaMptForCausalLM(LlavaMptConfig(attn_config={"attn_impl": impl}, **fields))
    weights = case.weights()
    if not any("vision_model." in key for key in model.state_dict()):
        weights = {key.replace("vision_tower.vision_model.", "vision_tower."): w for key, w in weights.items()}
    model.load_state_dict(weights)
    return model.eval()


def as_pairs(past):
    """Any cache as nested tuples (key, value) of [B, H, T, hd]."""
    if past is None or isinstance(past, tuple):
        return past
    layers = past.layers if hasattr(past, "layers") else None
    return tuple((layer.keys, layer.values) for layer in layers)


@register("llava_llama_", ("eager", "internvl"))
@register("llava_mpt_", ("torch", "triton"))
def run_models(case: Case, impl: str):
    model, caches = build(case, impl), {}
    for index, call in enumerate(case.calls()):
        if "past_from_call" in call:  # a copy: a cache grows in place
            pairs = caches[call["past_from_call"]]
            call["kwargs"]["past_key_values"] = cache_of(pairs) if call["method"] == "forward" else pairs
        yield run_call(case, call, model, caches, index)


def cache_of(pairs) -> DynamicCache:
    cache = DynamicCache()
    for layer, (key, value) in enumerate(pairs):
        cache.update(key, value, layer)
    return cache


def run_call(case: Case, call: dict, model, caches: dict, index: int) -> Outcome:
    name, kwargs, method = call["name"], call["kwargs"], call["method"]
    for field, value in call.get("set_config", {}).items():
        setattr(model.config, field, value)
    if name == "bad_select_feature":
        model.get_vision_tower().select_feature = "nonsense"
        return expect_raise(name, call, lambda: model.encode_images(**kwargs))
    if "raises" in call:
        return run_refusal(call, model)
    want, got = dict(call["outputs"]), {}
    if method == "forward":
        outputs = model(**kwargs)
        got = {key: outputs[key] for key in want if key in outputs}
        if outputs.past_key_values is not None:
            caches[index] = got["past_key_values"] = tuple(
                (k.clone(), v.clone()) for k, v in as_pairs(outputs.past_key_values)
            )
        if "logits_text_tail" in want:
            got["logits_text_tail"] = outputs.logits[:, -want["logits_text_tail"].shape[1] :]
    elif method == "prepare_inputs_labels_for_multimodal":
        names = ("input_ids", "attention_mask", "past_key_values", "inputs_embeds", "labels")
        got = dict(zip(names, model.prepare_inputs_labels_for_multimodal(**kwargs), strict=True))
    elif method == "generate":
        result = model.generate(**kwargs, return_dict_in_generate=True, output_logits=True)
        got = {"sequences": result.sequences, "scores": torch.stack(result.logits, 1)}
        got["new_tokens"] = result.sequences[:, -len(result.logits) :]
    elif method == "initialize_vision_tokenizer":
        model.initialize_vision_tokenizer(SimpleNamespace(**kwargs["model_args"]), Tokenizer(model.config.vocab_size))
        tables = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
        for kind, table in tables.items():
            got[f"{kind}_embeddings"] = table.weight
            got[f"{kind}_requires_grad"] = table.weight.requires_grad
        got["vocab_size"] = model.config.vocab_size
    else:
        got = tower_outputs(method, kwargs, model, want)
    rows = kwargs.get(call.get("valid_rows"))
    problems = differences(got, want, *case.tolerance(call), rows=rows)
    if "grads" in call:
        problems += gradients(case, call, model, outputs.loss)
    return Outcome(name, problems)


def gradients(case: Case, call: dict, model, loss) -> list[str]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    got = {f"w/{key}": p.grad for key, p in model.named_parameters()}
    atol, rtol = case.tolerance(call)
    return [f"gradient {p}" for p in differences(got, call["grads"], 5 * atol, 5 * rtol)]


def tower_outputs(method: str, kwargs: dict, model, want: dict) -> dict:
    tower = model.get_vision_tower()
    if method == "encode_images":
        return {"ret": model.encode_images(**kwargs)}
    if method.endswith("attributes"):
        return {key: getattr(tower, key) for key in want}
    out = tower(**kwargs)
    if "ret" in want:
        return {"ret": out}
    patches, queries = out
    return {
        "query_features": queries,
        "patch_features_first_3": patches[:, :3],
        "patch_features_shape": list(patches.shape),
    }


def run_refusal(call: dict, model) -> Outcome:
    name, method, recorded = call["name"], call["method"], call["raises"]["type"]

    def action():
        if method == "get_vision_tower().num_patches":
            return model.get_vision_tower().num_patches
        return (model if method == "forward" else getattr(model, method))(**call["kwargs"])

    if name in BETTER:
        action()
        return Outcome(name, deviation=BETTER[name])
    if recorded in ("AssertionError", "IndexError"):
        outcome = expect_raise(name, {"raises": {"type": "ValueError"}}, action)
        outcome.deviation = VALUE_ERROR.format(recorded)
        return outcome
    return expect_raise(name, call, action)


@register("projector")
def run_projectors(case: Case, _impl: str):
    for call in case.calls():
        name, config = call["name"], SimpleNamespace(**call["config"])
        if "raises" in call and call["method"] == "build_vision_projector":
            yield expect_raise(name, call, lambda c=config: build_vision_projector(c))
            continue
        projector = build_vision_projector(config)
        if "raises" in call:  # two_mlp serves one length
            features = (torch.zeros(1, 4, 3200), torch.zeros(1, 96, config.mm_hidden_size))
            yield expect_raise(name, call, lambda p=projector, f=features: p(f))
            continue
        shapes = {key: list(value.shape) for key, value in projector.state_dict().items()}
        problems = [] if shapes == call["state_dict_keys"] else [f"state dict {shapes}"]
        if call["outputs"]:
            projector.load_state_dict(case.weights(name + "."))
            got = {"ret": projector(call["kwargs"]["x"])}
            problems += differences(got, call["outputs"], *case.tolerance(call))
        yield Outcome(name, problems)
