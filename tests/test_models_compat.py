"""Original import paths lead to this package after one call, and only then."""

import importlib
import subprocess
import sys

import pytest
from internvl_kernels.models import compat, mpt
from internvl_kernels.models.llava import LlavaLlamaForCausalLM


def test_paths_exist_only_while_installed():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("llava")
    with compat.install():
        compat.install()
        from llava import LlavaLlamaForCausalLM as top
        from llava.model.language_model.mpt import attention
        from llava.model.language_model.mpt.attention import MultiheadAttention

        assert top is LlavaLlamaForCausalLM
        assert MultiheadAttention is mpt.MultiheadAttention and attention is mpt.attention
        for name in compat.MODULES:
            module = importlib.import_module(name)
            assert getattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2]) is module
        import llava.model.multimodal_encoder.internvl_14b.modeling_qllama as qllama

        assert qllama.LlamaCrossAttention
    assert not [name for name in sys.modules if name.split(".")[0] == "llava"]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("llava.constants")
    assert MultiheadAttention(8, 2).n_heads == 2  # what was imported stays usable


@pytest.mark.parametrize(
    ("original", "names"),
    [
        ("llava.constants", "IGNORE_INDEX IMAGE_TOKEN_INDEX DEFAULT_IMAGE_TOKEN DEFAULT_IM_START_TOKEN"),
        ("llava.mm_utils", "tokenizer_image_token"),
        ("llava.model", "LlavaLlamaForCausalLM LlavaConfig LlavaMptForCausalLM LlavaMptConfig"),
        ("llava.model.llava_arch", "LlavaMetaModel LlavaMetaForCausalLM"),
        ("llava.model.language_model.llava_llama", "LlavaConfig LlavaLlamaModel LlavaLlamaForCausalLM"),
        ("llava.model.language_model.llava_mpt", "LlavaMptConfig LlavaMptModel LlavaMptForCausalLM"),
        ("llava.model.language_model.mpt.attention", "build_attn_bias attn_bias_shape gen_slopes flash_attn_fn"),
        ("llava.model.language_model.mpt.hf_prefixlm_converter", "convert_hf_causal_lm_to_prefix_lm"),
        ("llava.model.multimodal_encoder.builder", "build_vision_tower"),
        ("llava.model.multimodal_encoder.clip_encoder", "CLIPVisionTower"),
        ("llava.model.multimodal_projector.builder", "build_vision_projector"),
        ("llava.model.multimodal_encoder.intern_vit_6b.modeling_intern_vit", "InternVisionModel"),
        ("llava.model.multimodal_encoder.internvl_14b.modeling_internvl", "InternVLModel"),
    ],
)
def test_original_names_are_there(original, names):
    with compat.install():
        module = importlib.import_module(original)
        assert not [name for name in names.split() if not hasattr(module, name)]


def test_an_installed_package_is_not_hidden(tmp_path):
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "__init__.py").write_text("theirs = True\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from internvl_kernels.models import compat\n"
        "try: compat.install()\n"
        "except ImportError as error: print(error)\n"
        "import llava; print(llava.theirs)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "llava/__init__.py) and is not hidden" in out and out.endswith("True\n")
