"""MPT: configuration, models, blocks and attention."""

from .attention import ATTN_CLASS_REGISTRY, AttnBias, MultiheadAttention, MultiQueryAttention
from .blocks import MPTMLP, MPTBlock
from .configuration_mpt import MPTConfig
from .conversion import from_transformers, to_transformers
from .custom_embedding import SharedEmbedding
from .modeling_mpt import MPTForCausalLM, MPTModel, MPTPreTrainedModel
from .norm import NORM_CLASS_REGISTRY, LPLayerNorm, LPRMSNorm, RMSNorm
from .param_init_fns import MODEL_INIT_REGISTRY

__all__ = [
    "ATTN_CLASS_REGISTRY",
    "MODEL_INIT_REGISTRY",
    "MPTMLP",
    "NORM_CLASS_REGISTRY",
    "AttnBias",
    "LPLayerNorm",
    "LPRMSNorm",
    "MPTBlock",
    "MPTConfig",
    "MPTForCausalLM",
    "MPTModel",
    "MPTPreTrainedModel",
    "MultiQueryAttention",
    "MultiheadAttention",
    "RMSNorm",
    "SharedEmbedding",
    "from_transformers",
    "to_transformers",
]
