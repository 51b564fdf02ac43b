"""Tiny vision-language models of random weights, one of each family, and a batch of two prompts with images of several sizes for them."""

from collections.abc import Callable

import pytest
import torch
import transformers as T

PAD, BOS, IMAGE, VIDEO = 0, 1, 150, 151
SPECIAL = [2, 145, 146, 147, 148, 149, IMAGE, VIDEO]
"""Never generated: a model of random weights would write image placeholders."""
TEXT = {
    "vocab_size": 160, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": 2,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "depth": 2, "num_heads": 2}
QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 148, "vision_end_token_id": 149}
ALTERNATING = ["sliding_attention", "full_attention"] * 2


def _pixels(size: int = 16) -> dict:
    return {"pixel_values": torch.randn(3, 3, size, size)}


def _clip(**options):
    return T.CLIPVisionConfig(**{"image_size": 16, "patch_size": 4, "projection_dim": 16, **VISION, **options})


def _siglip(**options):
    return T.SiglipVisionConfig(**{"image_size": 16, "patch_size": 4, "vision_use_head": False, **VISION, **options})


def llava():
    config = T.LlavaConfig(vision_config=_clip(), text_config=T.LlamaConfig(**TEXT), image_token_id=IMAGE)
    return T.LlavaForConditionalGeneration(config), _pixels()


def vipllava():
    config = T.VipLlavaConfig(
        vision_config=_clip(), text_config=T.LlamaConfig(**TEXT), image_token_id=IMAGE, vision_feature_layers=[-1, -2]
    )
    return T.VipLlavaForConditionalGeneration(config), _pixels()


def video_llava():
    config = T.VideoLlavaConfig(
        vision_config=_clip(), text_config=T.LlamaConfig(**TEXT), image_token_id=IMAGE, image_token_index=IMAGE, video_token_index=VIDEO,
        image_seq_length=16,
    )  # fmt: skip
    return T.VideoLlavaForConditionalGeneration(config), {"pixel_values_images": torch.randn(3, 3, 16, 16)}


def _tiles() -> dict:
    return {"pixel_values": torch.randn(3, 5, 3, 16, 16), "image_sizes": torch.tensor([[30, 20], [32, 32], [15, 32]])}


def llava_next():
    config = T.LlavaNextConfig(
        vision_config=_clip(), text_config=T.LlamaConfig(**TEXT), image_token_id=IMAGE, image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]]
    )
    return T.LlavaNextForConditionalGeneration(config), _tiles()


def llava_onevision():
    config = T.LlavaOnevisionConfig(
        vision_config=_siglip(), text_config=T.Qwen2Config(**TEXT), image_token_id=IMAGE, video_token_id=VIDEO,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )  # fmt: skip
    return T.LlavaOnevisionForConditionalGeneration(config), _tiles() | {"batch_num_images": torch.tensor([1, 1, 1])}


def _grids() -> dict:
    grid = torch.tensor([[1, 8, 8], [1, 6, 8], [1, 4, 8]])
    return {"pixel_values": torch.randn(int(grid.prod(dim=1).sum()), 3 * 2 * 4 * 4), "image_grid_thw": grid}


def qwen2_vl():
    vision = {**QWEN, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    config = T.Qwen2VLConfig(vision_config=vision, text_config={**TEXT, "rope_parameters": dict(ROPE)}, **QWEN_TOKENS)
    return T.Qwen2VLForConditionalGeneration(config), _grids()


def qwen2_5_vl():
    vision = {**QWEN, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
    text = {**TEXT, "rope_parameters": dict(ROPE)}
    config = T.Qwen2_5_VLConfig(vision_config={**vision, "tokens_per_second": 2}, text_config=text, **QWEN_TOKENS)
    return T.Qwen2_5_VLForConditionalGeneration(config), _grids()


_QWEN3_VISION = {
    **QWEN, "depth": 3, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}  # fmt: skip


def qwen3_vl():
    text = {**TEXT, "head_dim": 8, "rope_parameters": dict(ROPE)}
    config = T.Qwen3VLConfig(vision_config=dict(_QWEN3_VISION), text_config=text, **QWEN_TOKENS)
    return T.Qwen3VLForConditionalGeneration(config), _grids()


def qwen3_vl_moe():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1, "mlp_only_layers": []}
    text = {**TEXT, "head_dim": 8, "rope_parameters": dict(ROPE), **experts}
    config = T.Qwen3VLMoeConfig(vision_config=dict(_QWEN3_VISION), text_config=text, **QWEN_TOKENS)
    return T.Qwen3VLMoeForConditionalGeneration(config), _grids()


def qwen3_5():
    text = {
        **TEXT, "head_dim": 8, "rope_parameters": dict(ROPE, partial_rotary_factor=1.0), "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    }  # fmt: skip
    vision = {name: value for name, value in _QWEN3_VISION.items() if name != "deepstack_visual_indexes"}
    config = T.Qwen3_5Config(vision_config=vision, text_config=text, **QWEN_TOKENS)
    return T.Qwen3_5ForConditionalGeneration(config), _grids()


def glm4v():
    vision = {**QWEN, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "image_size": 32}
    tokens = {"image_start_token_id": 148, "image_end_token_id": 149, "video_start_token_id": 146, "video_end_token_id": 147}
    config = T.Glm4vConfig(
        vision_config=vision, text_config={**TEXT, "rope_parameters": dict(ROPE, partial_rotary_factor=1.0)},
        image_token_id=IMAGE, video_token_id=VIDEO, **tokens,
    )  # fmt: skip
    return T.Glm4vForConditionalGeneration(config), _grids()


def _one_image_a_place() -> dict:
    """[prompts, images of a prompt, ...], as the processors of the Idefics line lay images out; a missing image is zeros."""
    pixels = torch.randn(2, 2, 3, 16, 16)
    pixels[1, 1] = 0
    return {"pixel_values": pixels, "pixel_attention_mask": (pixels != 0).any(dim=2)}


def idefics3(config_class=T.Idefics3Config, model_class=T.Idefics3ForConditionalGeneration):
    config = config_class(
        vision_config={"image_size": 16, "patch_size": 2, **VISION}, text_config=T.LlamaConfig(**TEXT), image_token_id=IMAGE,
        scale_factor=2, pad_token_id=PAD,
    )  # fmt: skip
    return model_class(config), _one_image_a_place()


def smolvlm():
    return idefics3(T.SmolVLMConfig, T.SmolVLMForConditionalGeneration)


def idefics2():
    perceiver = {
        "hidden_size": 32, "resampler_n_latents": 12, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 8,
        "num_key_value_heads": 2,
    }  # fmt: skip
    config = T.Idefics2Config(
        vision_config={"image_size": 16, "patch_size": 4, **VISION}, text_config=T.MistralConfig(**TEXT, sliding_window=None),
        perceiver_config=perceiver, image_token_id=IMAGE,
    )  # fmt: skip
    return T.Idefics2ForConditionalGeneration(config), _one_image_a_place()


def internvl():
    vision = {"image_size": [16, 16], "patch_size": [2, 2], **VISION}
    config = T.InternVLConfig(
        vision_config=vision, text_config=T.Qwen2Config(**TEXT), image_token_id=IMAGE, image_seq_length=16, downsample_ratio=0.5
    )
    return T.InternVLForConditionalGeneration(config), _pixels()


def gemma3(sliding_window: int = 256):
    text = T.Gemma3TextConfig(
        **TEXT, head_dim=8, query_pre_attn_scalar=8, sliding_window=sliding_window, layer_types=ALTERNATING
    )  # fmt: skip
    tokens = {"image_token_id": IMAGE, "boi_token_index": 148, "eoi_token_index": 149, "mm_tokens_per_image": 16}
    config = T.Gemma3Config(vision_config=_siglip(image_size=32), text_config=text, **tokens)
    return T.Gemma3ForConditionalGeneration(config), _pixels(32)


def paligemma(is_second: bool = False):
    text = T.GemmaConfig(**TEXT, head_dim=8)
    if is_second:  # capped logits, and a window in every other layer; eager only
        text = T.Gemma2Config(**TEXT, head_dim=8, sliding_window=256, query_pre_attn_scalar=8, layer_types=ALTERNATING)
    config = T.PaliGemmaConfig(vision_config=_siglip(projection_dim=32), text_config=text, image_token_id=IMAGE, projection_dim=32)
    return T.PaliGemmaForConditionalGeneration(config), _pixels()


def mistral3():
    vision = T.PixtralVisionConfig(image_size=32, patch_size=4, head_dim=8, **VISION)
    text = T.MistralConfig(**TEXT, head_dim=8, sliding_window=None)
    config = T.Mistral3Config(vision_config=vision, text_config=text, image_token_id=IMAGE, spatial_merge_size=2)
    return T.Mistral3ForConditionalGeneration(config), _pixels(32) | {"image_sizes": torch.tensor([[32, 32], [24, 32], [32, 16]])}


def aya_vision():
    text = T.Cohere2Config(**TEXT, sliding_window=256, layer_types=ALTERNATING)
    config = T.AyaVisionConfig(
        vision_config=_siglip(patch_size=2), text_config=text, image_token_id=IMAGE, downsample_factor=2, vision_feature_layer=-1,
        adapter_layer_norm_eps=1e-6,
    )  # fmt: skip
    return T.AyaVisionForConditionalGeneration(config), _pixels()


def cohere2_vision():
    text = T.Cohere2Config(**TEXT, sliding_window=256, layer_types=ALTERNATING)
    config = T.Cohere2VisionConfig(
        vision_config=_siglip(patch_size=2), text_config=text, image_token_id=IMAGE, downsample_factor=2, alignment_intermediate_size=32
    )
    return T.Cohere2VisionForConditionalGeneration(config), _pixels()


def chameleon():
    codes = {f"IMGIMG{'ABCDEFGHIJ'[code // 10]}{'ABCDEFGHIJ'[code % 10]}Z": 20 + code for code in range(16)}
    words = {f"t{index}": index for index in range(160) if index not in codes.values() and index != IMAGE}
    quantizer = {
        "embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1,
        "resolution": 8, "in_channels": 3, "out_ch": 3,
    }  # fmt: skip
    config = T.ChameleonConfig(**TEXT, vq_config=quantizer, vocabulary_map={**words, "<image>": IMAGE, **codes})
    config.image_token_id = IMAGE
    return T.ChameleonForConditionalGeneration(config), _pixels(8)


def gemma4(num_kv_shared_layers: int = 0):
    text = T.Gemma4TextConfig(
        **TEXT, head_dim=8, global_head_dim=8, sliding_window=256, vocab_size_per_layer_input=160, hidden_size_per_layer_input=8,
        layer_types=ALTERNATING, num_kv_shared_layers=num_kv_shared_layers, enable_moe_block=False,
    )  # fmt: skip
    vision = T.Gemma4VisionConfig(
        **VISION, num_key_value_heads=2, head_dim=8, patch_size=4, pooling_kernel_size=2, position_embedding_size=64
    )
    tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": 145, "boi_token_id": 148, "eoi_token_id": 149}
    config = T.Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **tokens)
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    places = torch.stack([columns, rows], dim=-1).reshape(1, 64, 2).expand(3, -1, -1)
    return T.Gemma4ForConditionalGeneration(config), {"pixel_values": torch.rand(3, 64, 48), "image_position_ids": places}


def gemma4_shared():
    return gemma4(num_kv_shared_layers=2)


def lfm2_vl():
    text = T.Lfm2Config(**TEXT, layer_types=["conv", "full_attention"] * 2)
    vision = T.Siglip2VisionConfig(patch_size=4, num_patches=16, vision_use_head=False, **VISION)
    config = T.Lfm2VlConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, downsample_factor=2, projector_hidden_size=32)
    pixels = {"pixel_values": torch.randn(3, 16, 48), "pixel_attention_mask": torch.ones(3, 16, dtype=torch.int64)}
    return T.Lfm2VlForConditionalGeneration(config), pixels | {"spatial_shapes": torch.tensor([[4, 4]] * 3)}


FAMILIES: dict[str, Callable] = {
    function.__name__: function
    for function in (
        llava, llava_next, llava_onevision, vipllava, video_llava, qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe, qwen3_5, glm4v, smolvlm,
        idefics3, idefics2, internvl, gemma3, paligemma, mistral3, aya_vision, cohere2_vision, chameleon, gemma4, lfm2_vl,
    )
}  # fmt: skip


def token_types(name: str, ids: torch.Tensor) -> dict:
    """The token types that a family's processor gives beside the ids."""
    if name in ("gemma3", "paligemma"):
        return {"token_type_ids": (ids == IMAGE).long() if name == "gemma3" else torch.zeros_like(ids)}
    if name.startswith(("qwen", "glm", "gemma4")):
        return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}
    return {}


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that attention is far from uniform and the best token far from the second."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.15)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, None
    return model.eval()


def build(name: str, *, attention: str = "sdpa", seed: int = 0, **options) -> tuple[torch.nn.Module, dict]:
    """A model and a batch of two prompts: the first with two images, the second with one, shorter, and padded on the left."""
    torch.manual_seed(seed)
    model, inputs = FAMILIES[name](**options)
    model = spread(model)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        images = model._prepare_multimodal_encoder_kwargs_for_generation(dict(inputs))["mm_encoder_outputs"]["image"].pooler_output
    counts = [image.numel() // image.shape[-1] for image in images]
    if len(counts) == 2:  # the Idefics line joins the images of a prompt
        counts = [sum(counts) // 3] * 3
    first = [BOS, 5, 148, *[IMAGE] * counts[0], 149, 7, 148, *[IMAGE] * counts[1], 149, 9, 11, 30]
    second = [BOS, 6, 148, *[IMAGE] * counts[2], 149, 8, 12]
    length = max(len(first), len(second))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in (first, second)])
    return model, inputs | {"input_ids": ids, "attention_mask": (ids != PAD).long()} | token_types(name, ids)


def build_video(name: str, *, num_frames: int = 4) -> tuple[torch.nn.Module, dict]:
    """A model and one prompt with one video, whose second half of frames repeats the last one."""
    torch.manual_seed(0)
    model = spread(FAMILIES[name]()[0])
    if name.startswith("qwen"):
        grid = torch.tensor([[num_frames, 4, 4]])
        frames = torch.randn(num_frames, 16, 3 * 2 * 4 * 4)
        frames[num_frames // 2 :] = frames[num_frames // 2 - 1]
        inputs = {"pixel_values_videos": frames.flatten(0, 1), "video_grid_thw": grid}
    else:
        frames = torch.randn(1, num_frames, 3, 16, 16)
        frames[:, num_frames // 2 :] = frames[:, num_frames // 2 - 1, None]
        inputs = {"pixel_values_videos": frames}
    with torch.no_grad():
        video = model._prepare_multimodal_encoder_kwargs_for_generation(dict(inputs))["mm_encoder_outputs"]["video"].pooler_output
    count = sum(x.numel() // x.shape[-1] for x in video)
    if name == "qwen3_vl":  # it writes a time stamp before every frame
        cells = count // num_frames
        body = [token for frame in range(num_frames) for token in (40 + frame, 148, *[VIDEO] * cells, 149)]
    else:
        body = [148, *[VIDEO] * count, 149]
    ids = torch.tensor([[BOS, 5, *body, 9, 11]])
    return model, inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | token_types(name, ids)


def full_matrix(names: list[str]) -> list:
    """Parameters of a test over families: a few of different build by default, the others with the slow tests."""
    quick = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3")
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
