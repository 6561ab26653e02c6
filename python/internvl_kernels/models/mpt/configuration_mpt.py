"""Configuration of MPT models."""

from __future__ import annotations

import copy

from transformers import PretrainedConfig

from .alibi import check_attn_impl
from .hf_fields import fields_from_transformers, written_by_transformers

ATTN_CONFIG_DEFAULTS = {
    "attn_type": "multihead_attention",
    "attn_pdrop": 0.0,
    "attn_impl": "triton",
    "qk_ln": False,
    "clip_qkv": None,
    "softmax_scale": None,
    "prefix_lm": False,
    "attn_uses_sequence_id": False,
    "alibi": False,
    "alibi_bias_max": 8,
}
INIT_CONFIG_DEFAULTS = {
    "name": "kaiming_normal_",
    "fan_mode": "fan_in",
    "init_nonlinearity": "relu",
    "init_div_is_residual": True,
    "emb_init_std": None,
    "emb_init_uniform_lim": None,
    "init_std": None,
    "init_gain": 0.0,
}


class MPTConfig(PretrainedConfig):
    """MPT configuration.

    Args:
        d_model, n_heads, n_layers, expansion_ratio, vocab_size: sizes.
        max_seq_len: rows of the learned position table; with ALiBi and ``attn_impl='torch'`` the longest input.
        resid_pdrop, emb_pdrop: dropout probabilities.
        learned_pos_emb: must stay True without ALiBi.
        attn_config: attn_type ('multihead_attention', 'multiquery_attention'), attn_pdrop, attn_impl ('torch',
            'flash', 'triton'), qk_ln, clip_qkv, softmax_scale, prefix_lm, attn_uses_sequence_id, alibi,
            alibi_bias_max. Missing keys take the defaults.
        init_device: 'cpu', 'meta', or 'mixed' (meta on every rank but 0).
        logit_scale: factor on the logits, or 'inv_sqrt_d_model'. None: 1.
        no_bias: no biases in linears and norms.
        embedding_fraction: share of the gradient that reaches the embedding, in (0, 1].
        norm_type: a key of ``norm.NORM_CLASS_REGISTRY``.
        use_cache: whether ``forward`` keeps a cache unless told otherwise.
        layer_norm_epsilon: of the norms around attention and MLP, and of the last one.
        init_config: name and parameters of the weight initialisation (``param_init_fns.MODEL_INIT_REGISTRY``).
    Raises: ValueError (a value out of range); NotImplementedError ('flash' with prefix_lm, alibi or sequence ids:
        the file format's rule; ``MPTModel.set_attn_impl('flash')`` runs them).
    """

    model_type = "mpt"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012  (transformers reads it from the class)
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "max_seq_len",
    }

    def __init__(
        self,
        d_model: int = 2048,
        n_heads: int = 16,
        n_layers: int = 24,
        expansion_ratio: int = 4,
        max_seq_len: int = 2048,
        vocab_size: int = 50368,
        resid_pdrop: float = 0.0,
        emb_pdrop: float = 0.0,
        learned_pos_emb: bool = True,
        attn_config: dict | None = None,
        init_device: str = "cpu",
        logit_scale: float | str | None = None,
        no_bias: bool = False,
        verbose: int = 0,
        embedding_fraction: float = 1.0,
        norm_type: str = "low_precision_layernorm",
        use_cache: bool = False,
        init_config: dict | None = None,
        layer_norm_epsilon: float = 1e-5,
        **kwargs,
    ):
        self.d_model = d_model
        self.n_heads = n_heads
        self.n_layers = n_layers
        self.expansion_ratio = expansion_ratio
        self.max_seq_len = max_seq_len
        self.vocab_size = vocab_size
        self.resid_pdrop = resid_pdrop
        self.emb_pdrop = emb_pdrop
        self.learned_pos_emb = learned_pos_emb
        # Deep copies: two configurations never share a dict, and a caller's dict is never changed.
        self.attn_config = {**ATTN_CONFIG_DEFAULTS, **copy.deepcopy(attn_config or {})}
        self.init_device = init_device
        self.logit_scale = logit_scale
        self.no_bias = no_bias
        self.verbose = verbose
        self.embedding_fraction = embedding_fraction
        self.norm_type = norm_type
        self.layer_norm_epsilon = layer_norm_epsilon
        self.use_cache = use_cache
        self.init_config = {**INIT_CONFIG_DEFAULTS, **copy.deepcopy(init_config or {})}
        kwargs.pop("name", None)
        kwargs.pop("loss_fn", None)
        super().__init__(**kwargs)
        self._check()

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers; a configuration that transformers' own MPT wrote is read as that class means it."""
        if written_by_transformers(config_dict):
            config_dict = fields_from_transformers(config_dict)
        return super().from_dict(config_dict, **kwargs)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.d_model // self.n_heads

    @property
    def num_key_value_heads(self) -> int:
        """Key-value heads: 1 for multi-query attention."""
        return 1 if self.attn_config["attn_type"] == "multiquery_attention" else self.n_heads

    def _check(self) -> None:
        attn = self.attn_config
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model is {self.d_model}; it must be a multiple of n_heads = {self.n_heads}")
        probabilities = {
            "attn_config['attn_pdrop']": attn["attn_pdrop"],
            "resid_pdrop": self.resid_pdrop,
            "emb_pdrop": self.emb_pdrop,
        }
        for name, value in probabilities.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; a probability lies in [0, 1]")
        check_attn_impl(attn["attn_impl"])
        if attn["attn_impl"] == "flash":
            for feature in ("prefix_lm", "alibi", "attn_uses_sequence_id"):
                if attn[feature]:
                    raise NotImplementedError(
                        f"attn_config holds attn_impl='flash' with {feature}, which MPT configurations do not allow: "
                        "configure attn_impl='triton', or call model.set_attn_impl('flash') on the model"
                    )
        if not 0 < self.embedding_fraction <= 1:
            raise ValueError(f"embedding_fraction is {self.embedding_fraction}; it lies in (0, 1]")
        if isinstance(self.logit_scale, str) and self.logit_scale != "inv_sqrt_d_model":
            raise ValueError(f"logit_scale is {self.logit_scale!r}; allowed: a number, 'inv_sqrt_d_model', None")
        if self.init_config["name"] is None:
            raise ValueError("init_config['name'] is None; name an entry of param_init_fns.MODEL_INIT_REGISTRY")
        if not self.learned_pos_emb and not attn["alibi"]:
            raise ValueError(
                "learned_pos_emb is False and attn_config['alibi'] is False; the model needs one of the two"
            )
