"""``attn_implementation="internvl"``: the fused kernels inside unmodified Hugging Face models.

    from internvl_kernels.models import hf_attention

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=hf_attention.register())

Causal, padded, packed (position ids that restart), sliding-window, prefix and image-block masks run fused; what the
kernels cannot express runs as dense attention, with one warning. Nothing changes before ``register`` is called.
"""

from .attention import internvl_attention
from .masks import internvl_mask
from .register import NAME, register

__all__ = ["NAME", "internvl_attention", "internvl_mask", "register"]
