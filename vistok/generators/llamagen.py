"""GPTs of the shapes LlamaGen published (Sun et al. 2024, arXiv 2406.06525, table 1; its released configurations)."""

from dataclasses import replace

from vistok.generators.gpt import GPT, GPTConfig
from vistok.registry import register


def _llamagen(overrides: dict, **shape) -> GPT:
    """LlamaGen's shape on a 16 x 16 grid of 16,384 codes, with ImageNet's classes unless overrides say otherwise."""
    fixed = dict(codebook_size=16384, layout_shape=(16, 16), condition_attention="uniform", num_classes=1000)
    return GPT(replace(GPTConfig(**shape, **fixed), **overrides))


@register
def gpt_b(**overrides) -> GPT:
    """LlamaGen-B: 768 wide, 12 layers, 12 heads; 111 M parameters."""
    return _llamagen(overrides, width=768, depth=12, num_heads=12)


@register
def gpt_l(**overrides) -> GPT:
    """LlamaGen-L: 1024 wide, 24 layers, 16 heads; 343 M parameters."""
    return _llamagen(overrides, width=1024, depth=24, num_heads=16)


@register
def gpt_xl(**overrides) -> GPT:
    """LlamaGen-XL: 1280 wide, 36 layers, 20 heads; 775 M parameters."""
    return _llamagen(overrides, width=1280, depth=36, num_heads=20)


@register
def gpt_xxl(**overrides) -> GPT:
    """LlamaGen-XXL: 1536 wide, 48 layers, 24 heads; 1.4 B parameters."""
    return _llamagen(overrides, width=1536, depth=48, num_heads=24)


@register
def gpt_3b(**overrides) -> GPT:
    """LlamaGen-3B: 3200 wide, 24 layers, 32 heads; 3.1 B parameters."""
    return _llamagen(overrides, width=3200, depth=24, num_heads=32)


@register
def gpt_xl_t2i(**overrides) -> GPT:
    """LlamaGen-XL for captions, read by FLAN-T5-XL in 120 tokens with the padding on the left; 775 M parameters."""
    text = dict(num_classes=0, text="google/flan-t5-xl", caption_tokens=120, caption_width=2048, caption_padding="hidden")
    return _llamagen({**text, **overrides}, width=1280, depth=36, num_heads=20)
