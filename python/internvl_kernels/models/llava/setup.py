"""Turning a language model into a LLaVA: tower and projector, and the tokens around an image."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from .projector import build_vision_projector
from .tower_builder import build_vision_tower


def read_adapter(path: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter file (.safetensors, or a torch file of tensors). Raises: ValueError (unreadable)."""
    from safetensors.torch import load_file

    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch's unpickler fails in many ways on bytes that are no pickle
        raise ValueError(f"the adapter file {str(path)!r} is unreadable: {error}") from error


def _under(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors below ``name.`` wherever it stands in their keys, with everything up to it removed."""
    mark = name + "."
    return {key.split(mark, 1)[1]: value for key, value in tensors.items() if mark in key}


class VisionSetup:
    """Mixin of the inner model."""

    def initialize_vision_modules(self, model_args, fsdp=None) -> None:
        """Load the tower, make a fresh projector, and record both in the configuration.

        Args:
            model_args: ``vision_tower``, ``mm_vision_select_layer``, ``mm_vision_select_feature``, and perhaps
                ``mm_projector_type`` ('linear'), ``mm_tune_vision_tower``, ``pretrain_mm_mlp_adapter`` (a file).
            fsdp: a non-empty value keeps the tower out of the module tree, in a list.
        Raises: ValueError (not a tower; an adapter that does not fit the projector).
        """
        config = self.config
        config.mm_vision_tower, config.mm_vision_config = model_args.vision_tower, None
        config.mm_vision_select_layer = getattr(model_args, "mm_vision_select_layer", -2)
        config.mm_vision_select_feature = getattr(model_args, "mm_vision_select_feature", "patch")
        config.mm_projector_type = getattr(model_args, "mm_projector_type", None) or "linear"
        config.mm_tune_vision_tower = bool(getattr(model_args, "mm_tune_vision_tower", False))
        tower = build_vision_tower(config, delay_load=False)
        config.use_mm_proj, config.mm_hidden_size = True, tower.hidden_size
        weight = self.get_input_embeddings().weight
        self.mm_projector = build_vision_projector(config).to(weight.device, weight.dtype)
        tower.to(weight.device)
        if hasattr(self, "vision_tower"):
            del self.vision_tower  # a module's place takes no list
        self.vision_tower = [tower] if fsdp else tower
        adapter = getattr(model_args, "pretrain_mm_mlp_adapter", None)
        if adapter is not None:
            self._load_adapter(read_adapter(adapter), str(adapter), tower)

    def _load_adapter(self, tensors: dict[str, Tensor], path: str, tower: nn.Module) -> None:
        given, wanted = _under(tensors, "mm_projector"), self.mm_projector.state_dict()
        wrong = [
            f"{key} is {list(given[key].shape) if key in given else 'missing'}, expected "
            f"{list(wanted[key].shape) if key in wanted else 'no such key'}"
            for key in sorted({*given, *wanted})
            if key not in given or key not in wanted or given[key].shape != wanted[key].shape
        ]
        if wrong:
            raise ValueError(f"the adapter file {path!r} does not fit the projector: {'; '.join(wrong)}")
        self.mm_projector.load_state_dict(given)
        if any("position_embedding" in key for key in tensors):
            embeddings = {key: value for key, value in _under(tensors, "vision_tower").items() if "embeddings" in key}
            tower.load_state_dict(embeddings, strict=False)


class VisionTokenizerSetup:
    """Mixin of the causal-LM class."""

    def initialize_vision_tokenizer(self, model_args, tokenizer) -> None:
        """Add the tokens that stand around images, and rows for them.

        New rows are the mean of all old ones. With ``tune_mm_mlp_adapter`` the input table is trained and the output
        table is not (one table for both, as in MPT, stays trained).
        Args:
            model_args: ``mm_use_im_patch_token``, ``mm_use_im_start_end``, ``tune_mm_mlp_adapter``,
                ``pretrain_mm_mlp_adapter`` (a file with the two input rows, or a full table).
            tokenizer: anything with ``add_tokens(list, special_tokens=True) -> int`` and a length.
        Raises: ValueError (an adapter with another number of rows).
        """
        if model_args.mm_use_im_patch_token:
            tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
            self._grow_vocabulary(len(tokenizer))
        if model_args.mm_use_im_start_end:
            new = tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
            self._grow_vocabulary(len(tokenizer))
            tables = self._token_tables()
            if new > 0:
                for table in tables:
                    table[-new:] = table[:-new].mean(0, keepdim=True)
            self._train_tokens(model_args.tune_mm_mlp_adapter, True)
            if model_args.pretrain_mm_mlp_adapter:
                path = model_args.pretrain_mm_mlp_adapter
                _copy_rows(tables[0], read_adapter(path), str(path))
        elif model_args.mm_use_im_patch_token:
            self._train_tokens(model_args.tune_mm_mlp_adapter, False)

    def _grow_vocabulary(self, size: int) -> None:
        self.resize_token_embeddings(size, mean_resizing=False)

    def _token_tables(self) -> list[Tensor]:
        """Input and output table, outside the graph; one entry when they are the same."""
        tables = [self.get_input_embeddings().weight, self.get_output_embeddings().weight]
        return [table.data for table in (tables[:1] if tables[0] is tables[1] else tables)]

    def _train_tokens(self, tune_adapter: bool, inputs: bool) -> None:
        if tune_adapter:
            self.get_output_embeddings().weight.requires_grad_(False)
            self.get_input_embeddings().weight.requires_grad_(inputs)


def _copy_rows(table: Tensor, tensors: dict[str, Tensor], path: str) -> None:
    """The rows of <im_start> and <im_end>, the last two."""
    found = [value for key, value in tensors.items() if key.endswith(("embed_tokens.weight", "wte.weight"))]
    if not found:
        raise ValueError(f"the adapter file {path!r} holds no token embeddings (embed_tokens.weight or wte.weight)")
    rows = found[0]
    if rows.shape not in (table.shape, (2, table.shape[1])):
        raise ValueError(
            f"the adapter file {path!r} holds token embeddings of shape {list(rows.shape)}; "
            f"expected {list(table.shape)}, or the two new rows [2, {table.shape[1]}]"
        )
    table[-2:] = rows[-2:].to(table.dtype)
