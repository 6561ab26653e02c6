"""Small Q-LLaMAs and what the tests feed them."""

import torch
from internvl_kernels.models.qllama import LlamaForCausalLM, QLlamaConfig

N, WIDTH, VOCAB = 6, 20, 50  # query tokens, vision width, vocabulary
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def tiny(cls=LlamaForCausalLM, **changes):
    torch.manual_seed(7)
    config = QLlamaConfig(num_query_token=N, vision_hidden_size=WIDTH, **{**SIZES, **changes})
    model = cls(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def ids(batch, length):
    return torch.randint(2, VOCAB, (batch, length))


def padded_left(batch, length, *pads):
    mask = torch.ones(batch, length, dtype=torch.long)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    return mask


def vision_of(batch):
    return torch.randn(batch, 5, WIDTH)
