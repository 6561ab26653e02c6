"""Prefix-LM conversion of Hugging Face causal LMs.

model = convert_hf_causal_lm_to_prefix_lm(AutoModelForCausalLM.from_pretrained(path))
loss = model(input_ids, attention_mask=attention_mask, bidirectional_mask=bidirectional_mask, labels=labels).loss
answer = model.generate(input_ids, attention_mask=attention_mask)  # the prompt is the prefix
"""

from .batch import PrefixLMCollator, add_bidirectional_mask_if_missing
from .convert import convert_hf_causal_lm_to_prefix_lm, load_prefix_lm, revert_prefix_lm

__all__ = [
    "PrefixLMCollator",
    "add_bidirectional_mask_if_missing",
    "convert_hf_causal_lm_to_prefix_lm",
    "load_prefix_lm",
    "revert_prefix_lm",
]
