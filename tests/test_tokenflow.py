"""TokenFlow's behaviour at tiny sizes; parity with the reference is in tests/parity."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import vistok
from vistok.convert.pickles import read_state
from vistok.convert.tokenflow import FILE_NAME, from_official, load_tower, to_official
from vistok.data.loader import make_batch
from vistok.tokenizers.tokenflow import CLIP_MEAN, CLIP_STD, TokenFlow
from vistok.tokenizers.tokenflow_nets import SemanticEncoderConfig, build_semantic_encoder
from vistok.tokens import VisualTokens
from vistok.training.recipes import Sources, get_recipe
from vistok.training.tasks.semantic_losses import match_teacher
from vistok.training.tasks.teacher import VisionTeacher
from vistok.training.tasks.tokenflow import TokenFlowTask, TokenFlowTaskConfig


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return vistok.create("tokenflow-tiny").eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def batch_of(count):
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    numbers = torch.arange(count)
    return make_batch(pixels, numbers, [f"noto: thing {i}" for i in range(count)], numbers, numbers.numpy(), seed=0, flip=False, shift=0)


# -- tokens -----------------------------------------------------------------------------------------------------------------------------


def test_any_prefix_of_whole_scales_is_what_encoding_fewer_tokens_gives_and_decodes(model, images):
    tokens = model.encode(images)
    for count in (1, 5, 21):
        assert torch.equal(model.encode(images, num_tokens=count).ids, tokens.ids[:, :count])
        assert model.decode(tokens.truncate(count)).shape == images.shape


def test_a_prefix_that_ends_inside_a_scale_is_an_error_that_names_the_ends_of_scales(model, images):
    with pytest.raises(ValueError, match="1, 5, 21"):
        model.encode(images, num_tokens=4)
    with pytest.raises(ValueError, match="whole scales end at"):
        model.decode(model.encode(images).truncate(6))


def test_images_with_different_counts_decode_as_they_would_alone(model, images):
    tokens = model.encode(images).truncate(torch.tensor([1, 21, 5]))
    together = model.decode(tokens)
    for i in range(3):
        torch.testing.assert_close(together[i], model.decode(tokens[i].truncate(int(tokens.counts[i])))[0], atol=1e-5, rtol=0)


def test_one_id_names_the_nearest_pair_of_unit_codes(model):
    vq = model.quantizer.quantizer
    z = torch.randn(50, model.code_dim, generator=torch.Generator().manual_seed(3))
    split = (model.settings.semantic_dim, model.settings.pixel_dim)
    (a, p), (ea, ep) = (tuple(F.normalize(part, dim=1) for part in table.split(split, 1)) for table in (z, vq.codebook))
    distances = torch.cdist(a, ea).square() + model.settings.pixel_weight * torch.cdist(p, ep).square()
    assert torch.equal(vq.nearest(z), distances.argmin(1))
    torch.testing.assert_close(model.embed(torch.arange(64)), torch.cat([ea, ep], 1))


def test_each_feature_strategy_is_the_sum_that_it_says(model, images):
    tokens = model.encode(images)
    full, semantic = model.visual_features(tokens), model.visual_features(tokens, "last_semantic")
    residuals, scales = model.visual_features(tokens, "residuals"), model.visual_features(tokens, "all_scales")
    assert full.shape == (3, 16, 12) and torch.equal(semantic, full[..., :8])
    assert residuals.shape == scales.shape == (3, 21, 12)
    torch.testing.assert_close(residuals, model.embed(tokens.ids))
    torch.testing.assert_close(scales[:, 5:], full)
    torch.testing.assert_close(scales[:, :1], residuals[:, :1])
    enlarged = sum(
        F.interpolate(part.mT.unflatten(2, (side, side)), size=(4, 4), mode="bicubic")
        for part, side in zip(residuals.split((1, 4, 16), 1), (1, 2, 4))
    )
    torch.testing.assert_close(full, enlarged.flatten(2).mT)
    with pytest.raises(ValueError, match="last_sum"):
        model.visual_features(tokens, "first")


def test_the_last_scale_alone_makes_a_single_scale_tokenizer(images):
    single = vistok.create("tokenflow-tiny", scales=(4,)).eval()
    tokens = single.encode(images)
    assert single.min_tokens == single.max_tokens == 16 and tokens.layout.shape == ((4, 4),)
    torch.testing.assert_close(single.visual_features(tokens), single.embed(tokens.ids))
    assert single.decode(tokens).shape == images.shape


def test_decoded_meaning_and_pixels_each_read_their_own_channels(model, images):
    total = model.total(model.encode(images))
    other = total.clone()
    other[:, model.settings.semantic_dim :] += 1
    with torch.no_grad():
        assert torch.equal(model.decode_meaning(total), model.decode_meaning(other))
        assert not torch.allclose(model.decode_pixels(total), model.decode_pixels(other))


# -- input ------------------------------------------------------------------------------------------------------------------------------


def test_input_normalisation_is_the_configs(model, images):
    wide = images * 1.5
    raw = TokenFlow(replace(model.settings, mean=None, std=None))
    clip = TokenFlow(replace(model.settings, mean=CLIP_MEAN, std=CLIP_STD))
    assert torch.equal(raw.normalize(wide), wide)
    torch.testing.assert_close(model.normalize(wide), wide.clamp(-1, 1))
    expected = (wide.clamp(-1, 1) / 2 + 0.5 - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    torch.testing.assert_close(clip.normalize(wide), expected)


def test_images_of_another_size_are_refused(model):
    with pytest.raises(ValueError, match="takes 32 x 32 only"):
        model.encode(torch.zeros(1, 3, 64, 64))


def test_an_image_that_does_not_fit_the_grid_is_resized_on_its_way_in_and_out(model):
    encoder = replace(model.settings.encoder, patch_size=7)  # 28 px of patches a side, 32 px of pixel grid, as SigLIP's 378 and 432
    odd = TokenFlow(replace(model.settings, image_size=(30, 30), encoder=encoder)).eval()
    assert odd.settings.pixel_size == 32
    assert odd.decode(odd.encode(torch.zeros(1, 3, 30, 30))).shape == (1, 3, 30, 30)
    assert TokenFlow(replace(odd.settings, decoded_size=48)).decode(odd.encode(torch.zeros(1, 3, 30, 30))).shape == (1, 3, 48, 48)


@pytest.mark.parametrize("change, message", [
    ({"scales": (1, 4, 2)}, "must grow"),
    ({"scales": (1, 2, 8)}, "patches a side"),
    ({"mean": None}, "given together"),
    ({"image_size": (32, 64)}, "square"),
])  # fmt: skip
def test_a_config_that_cannot_be_says_why(model, change, message):
    with pytest.raises(ValueError, match=message):
        replace(model.settings, **change)


def test_a_timm_tower_is_found_by_its_plain_name_only():
    with pytest.raises(ValueError, match="timm knows no model"):
        build_semantic_encoder(SemanticEncoderConfig(kind="timm", timm_name="hf-hub:someone/something", width=8), image_size=32)


@pytest.mark.slow
def test_a_timm_tower_serves_as_the_semantic_encoder_and_goes_through_the_official_format(model, tmp_path):
    encoder = SemanticEncoderConfig(kind="timm", timm_name="test_vit", width=64)
    timm_model = TokenFlow(replace(model.settings, image_size=(64, 64), encoder=encoder, pixel_multipliers=(1,) * 5)).eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(4)) * 2 - 1
    tokens = timm_model.encode(images)
    to_official(timm_model, tmp_path)
    options = {**official_options(timm_model), "image_size": (64, 64), "timm_name": "test_vit"}
    del options["encoder_heads"]
    assert torch.equal(from_official(tmp_path, **options).encode(images).ids, tokens.ids)
    wrong = TokenFlow(replace(timm_model.settings, scales=(1, 2, 3)))
    with pytest.raises(ValueError, match="makes 16 tokens"):
        wrong.encode(images)


# -- official format --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_like(model):
    encoder = replace(model.settings.encoder, kind="clip", width=48)
    settings = replace(
        model.settings, encoder=encoder, mean=None, std=None, norm_groups=16, pixel_width=16, semantic_decoder_heads=12, decoded_size=None
    )
    return TokenFlow(settings).eval()


def official_options(model):
    settings = model.settings
    return dict(
        image_size=settings.image_size, scales=settings.scales, norm_groups=settings.norm_groups, encoder_heads=settings.encoder.num_heads,
        semantic_decoder_heads=settings.semantic_decoder_heads, decoded_size=settings.decoded_size,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_official_format_keeps_every_weight_and_every_id(model, clip_like, images, kind, tmp_path):
    original = {"clip": clip_like, "siglip": model}[kind]
    to_official(original, tmp_path)
    again = from_official(tmp_path / FILE_NAME, **official_options(original))
    assert again.settings == original.settings
    assert torch.equal(again.encode(images).ids, original.encode(images).ids)
    to_official(again, tmp_path / "again")
    first, second = (read_state(folder / FILE_NAME) for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_bias_of_keys_changes_nothing_so_the_official_format_does_without(model, images, tmp_path):
    moved = TokenFlow(model.settings).eval()
    moved.load_state_dict(model.state_dict())
    width = model.settings.encoder.width
    for block in moved.semantic_decoder.blocks:
        torch.nn.init.normal_(block.attention.qkv.bias[width : 2 * width])
    tokens = model.encode(images)
    torch.testing.assert_close(moved.decode_semantic(tokens), model.decode_semantic(tokens), atol=1e-5, rtol=0)


def test_averaged_weights_are_preferred_and_what_does_not_fit_is_named(model, tmp_path):
    to_official(model, tmp_path)
    state = read_state(tmp_path / FILE_NAME)
    averaged = {key: value for key, value in state.items() if not key.startswith(("scaling_layer", "quantize.codebook_used"))}
    averaged["quant_conv.bias"] = state["quant_conv.bias"] + 1
    torch.save({"model": state, "ema": averaged, "steps": 7}, tmp_path / "both.pt")
    loaded = from_official(tmp_path / "both.pt", **official_options(model))
    assert torch.equal(loaded.to_pixel_code.bias, model.to_pixel_code.bias + 1)
    state["stranger"] = state.pop("decoder.conv_out.bias")
    torch.save({"model": state}, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match=r"missing decoder.conv_out.bias[\s\S]*unexpected stranger"):
        from_official(tmp_path / "wrong.pt", **official_options(model))


def test_a_size_nobody_published_asks_for_what_the_file_does_not_say(model, tmp_path):
    to_official(model, tmp_path)
    with pytest.raises(ValueError, match="encoder_heads="):
        from_official(tmp_path)
    options = {**official_options(model), "scales": None}
    del options["scales"]
    with pytest.raises(ValueError, match="scales="):
        from_official(tmp_path, **options)


def test_the_counters_of_revived_codes_stay_out_of_the_official_format(model, images, tmp_path):
    training = dict(codebook_update="ema", kmeans_iterations=2, revive_after=3)
    revived = TokenFlow(replace(model.settings, **training)).eval()
    to_official(revived, tmp_path)
    again = from_official(tmp_path, **official_options(revived), **training)
    assert torch.equal(again.encode(images).ids, revived.encode(images).ids)


@pytest.mark.slow
def test_semantic_encoders_compute_what_transformers_computes(images):
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    shape = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8)
    for kind, built in (("siglip", SiglipVisionModel(SiglipVisionConfig(**shape))), ("clip", CLIPVisionModel(CLIPVisionConfig(**shape)))):
        depth = 2 if kind == "siglip" else 3
        encoder = SemanticEncoderConfig(kind=kind, width=48, depth=depth, num_heads=4, hidden=64, patch_size=8, table_grid=4)
        model = vistok.create("tokenflow-tiny", encoder=encoder, mean=None, std=None)
        for parameter in built.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        tower = getattr(built, "vision_model", built)
        load_tower(model, tower)
        with torch.no_grad():
            out = tower(pixel_values=images, output_hidden_states=True)
            expected = out.hidden_states[-2] if kind == "siglip" else tower.post_layernorm(out.last_hidden_state)[:, 1:]
            torch.testing.assert_close(model.semantic_tokens(images), expected, atol=1e-4, rtol=1e-4)


# -- training ---------------------------------------------------------------------------------------------------------------------------


def test_gradients_reach_both_encoders_both_decoders_and_the_codebook(images):
    task = TokenFlowTask(vistok.create("tokenflow-tiny", entropy_weight=0.1), TokenFlowTaskConfig(scale_dropout=0.0)).train()
    loss, logs = task(batch_of(4), None, 0)
    loss.backward()
    assert {"mse", "commitment", "codebook", "entropy", "semantic", "codes"} == set(logs) and int(logs["codes"].sum()) == 4 * 21
    without = [name for name, parameter in task.named_parameters() if parameter.grad is None or not parameter.grad.isfinite().all()]
    assert not without


def test_a_left_out_scale_has_no_ids_and_is_never_the_first():
    task = TokenFlowTask(vistok.create("tokenflow-tiny"), TokenFlowTaskConfig(scale_dropout=1.0))
    dropped = {task._dropped(step) for step in range(50)}
    assert dropped == {1, 2}
    out = task.model(batch_of(2).images, dropped=1)
    assert (out.tokens.ids[:, 1:5] == -1).all() and (out.tokens.ids[:, [0, 5]] >= 0).all()


def test_about_one_step_in_ten_leaves_out_a_scale():
    task = TokenFlowTask(vistok.create("tokenflow-tiny"))
    left_out = sum(task._dropped(step) is not None for step in range(2000))
    assert 150 <= left_out <= 250  # 200 +- 3.7 standard deviations


@pytest.mark.parametrize("semantic", ["captions", "classes", "none"])
def test_meaning_can_come_from_captions_classes_or_nowhere(semantic):
    task = TokenFlowTask(vistok.create("tokenflow-tiny"), TokenFlowTaskConfig(semantic=semantic, buckets=16)).train()
    loss, logs = task(batch_of(2), None, 0)
    assert loss.isfinite() and ("semantic" in logs) == (semantic != "none")


def test_a_teacher_with_another_grid_is_resized_and_one_of_another_width_refused():
    target = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    assert float(match_teacher(target, target)) == pytest.approx(0, abs=1e-6)
    assert match_teacher(torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(1)), target).ndim == 0
    with pytest.raises(ValueError, match="teacher_width=4"):
        match_teacher(torch.zeros(2, 9, 4), target)


@pytest.mark.slow
def test_a_transformers_tower_teaches_and_starts_the_encoder(tmp_path):
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipTextConfig, SiglipVisionConfig

    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    vision, text = (
        SiglipVisionConfig(**shape, image_size=32, patch_size=8),
        SiglipTextConfig(**shape, vocab_size=16, max_position_embeddings=4),
    )
    SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).save_pretrained(tmp_path)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    config = TokenFlowTaskConfig(semantic="teacher", teacher=str(tmp_path), teacher_layer=-2, start_from_teacher=True)
    task = TokenFlowTask(vistok.create("tokenflow-tiny"), config).train()
    loss, logs = task(batch_of(2), None, 0)
    assert loss.isfinite() and not any(parameter.requires_grad for parameter in task.teacher.parameters())
    same = VisionTeacher(str(tmp_path), reads="patches", layer=-2)(batch_of(2).images)
    torch.testing.assert_close(task.model.semantic_tokens(batch_of(2).images), same, atol=1e-4, rtol=1e-4)


def test_the_semantic_half_learns_alone_before_codes_are_placed():
    model = vistok.create("tokenflow-tiny", codebook_update="ema", kmeans_iterations=2, revive_after=3)
    task = TokenFlowTask(model, TokenFlowTaskConfig(semantic_steps=2, semantic_weight=0.5)).train()
    loss, logs = task(batch_of(4), None, 1)
    loss.backward()
    trained = {name.split(".")[1] for name, p in task.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == {"semantic_encoder", "to_semantic_code", "semantic_decoder", "from_semantic", "head"} and set(logs) == {"semantic"}
    assert not model.quantizer.quantizer.started
    assert {"mse", "semantic", "commitment", "codes"} == set(task(batch_of(4), None, 2)[1])
    assert model.quantizer.quantizer.started
    with pytest.raises(ValueError, match="learns no meaning"):
        TokenFlowTaskConfig(semantic="none", semantic_steps=2)


def test_words_of_captions_and_class_names_both_count_and_one_of_them_must_be_there():
    task = TokenFlowTask(vistok.create("tokenflow-tiny"))
    task.dataset = SimpleNamespace(classes=["red", "blue"], captions=[""])
    batch = SimpleNamespace(captions=["an apple", ""], labels=torch.tensor([1, -1]))
    assert [text.split() for text in task._texts(batch)] == [["an", "apple", "blue"], []]
    task.on_start(task.dataset)
    with pytest.raises(ValueError, match="neither captions"):
        task.on_start(SimpleNamespace(classes=[], captions=["", ""]))


def test_the_recipe_fits_images_of_other_sizes():
    model = get_recipe("tokenflow-emoji", "tokenizer").build(Sources(image_size=96)).model
    assert model.settings.scales == (1, 2, 4, 8, 12) and model.settings.pixel_size == 96
    with pytest.raises(ValueError, match="multiple of the recipe's patches of 8"):
        get_recipe("tokenflow-emoji", "tokenizer").build(Sources(image_size=60))


def test_folded_pixels_have_no_official_form(tmp_path):
    with pytest.raises(ValueError, match="pixel_patch=4"):
        to_official(vistok.create("tokenflow-small"), tmp_path)


def test_only_the_decoder_trains_in_the_last_stage():
    task = TokenFlowTask(vistok.create("tokenflow-tiny"), TokenFlowTaskConfig(semantic="none", freeze_all_but_decoder=True)).train()
    loss, _ = task(batch_of(2), None, 0)
    loss.backward()
    trained = {name.split(".")[1] for name, parameter in task.named_parameters() if parameter.grad is not None}
    assert trained == {"pixel_decoder"}


def test_a_few_steps_lower_the_loss_and_keep_codes_in_use():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        task = get_recipe("tokenflow-tiny", "tokenizer").build(Sources()).train()
    batch, first = batch_of(2), None
    optimizer = torch.optim.Adam(task.parameters(), lr=3e-3)
    for _ in range(8):
        loss, logs = task(batch, None, 1000)
        first = float(loss.detach()) if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.9 * first
    assert int((logs["codes"] > 0).sum()) >= 6


def test_tokens_survive_the_trip_through_a_layout(model, images):
    tokens = model.encode(images)
    assert torch.equal(model.decode(VisualTokens.from_ids(tokens.ids, model.layout)), model.decode(tokens))
