"""Frozen vision models as teachers: transformers, timm and our own give the tokens and vectors their libraries give."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import vistok
from vistok.tokenizers.tokenflow import CLIP_MEAN, CLIP_STD
from vistok.training.recipes import Sources, get_recipe
from vistok.training.tasks.semantic_losses import CaptionHead
from vistok.training.tasks.teacher import VisionTeacher
from vistok.training.tasks.tokenflow import TokenFlowTask, TokenFlowTaskConfig


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


SIZES = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)


def as_seen(images, size, mean, std):
    resized = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
    return ((resized / 2 + 0.5).clamp(0, 1) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def test_a_tower_of_ours_teaches_with_its_features_and_its_pooled_vector(images, tmp_path):
    tower = vistok.create("vision-tower-tiny", classes=("a", "b")).eval()
    tower.save_pretrained(tmp_path)
    patches, image = (VisionTeacher(str(tmp_path), reads=kind) for kind in ("patches", "image"))
    with torch.no_grad():
        torch.testing.assert_close(patches(images), tower.features(images), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(image(images), tower.pooled(images), atol=1e-5, rtol=1e-5)
    assert patches.width == image.width == 32 and not any(p.requires_grad for p in patches.parameters())
    model = vistok.create("tokenflow-tiny")
    task = TokenFlowTask(model, TokenFlowTaskConfig(semantic="teacher", teacher=str(tmp_path), semantic_steps=1)).train()
    loss, logs = task(SimpleNamespace(images=images), None, 0)
    loss.backward()
    assert set(logs) == {"semantic"} and 0 <= float(loss.detach()) <= 2
    with pytest.raises(ValueError, match="a teacher is a VisionTower"):
        VisionTeacher("vistok/emoji-fsq2d", reads="image")


@pytest.mark.slow
def test_a_projected_clip_tower_gives_its_image_embedding(images, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**SIZES, projection_dim=12)).eval()
    model.save_pretrained(tmp_path)
    seen = as_seen(images, 16, CLIP_MEAN, CLIP_STD)  # saved without a processor, CLIP's own numbers hold
    with torch.no_grad():
        expected = model(pixel_values=seen).image_embeds
        torch.testing.assert_close(VisionTeacher(str(tmp_path), reads="image")(images), expected, atol=1e-5, rtol=1e-5)
        other = VisionTeacher(str(tmp_path), reads="image", mean=(0.5,) * 3, std=(0.5,) * 3)
        torch.testing.assert_close(other(images), model(pixel_values=as_seen(images, 16, (0.5,) * 3, (0.5,) * 3)).image_embeds)
    assert VisionTeacher(str(tmp_path), reads="patches")(images).shape == (2, 4, 12)


@pytest.mark.slow
def test_a_dino_without_a_processor_asks_for_its_normalisation(images, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, mlp_ratio=1)).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="give mean and std"):
        VisionTeacher(str(tmp_path), reads="patches")
    teacher = VisionTeacher(str(tmp_path), reads="patches", mean=(0.4,) * 3, std=(0.3,) * 3)
    with torch.no_grad():
        expected = model(pixel_values=as_seen(images, 16, (0.4,) * 3, (0.3,) * 3)).last_hidden_state[:, 1:]
    torch.testing.assert_close(teacher(images), expected, atol=1e-5, rtol=1e-5)


def test_what_a_teacher_cannot_do_is_said(tmp_path):
    with pytest.raises(ValueError, match="given together"):
        VisionTeacher("anything", reads="image", mean=(0.5,) * 3)
    vistok.create("vision-tower-tiny").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layer=-2"):
        VisionTeacher(str(tmp_path), reads="patches", layer=-2)


def test_the_right_caption_costs_least_and_images_without_text_take_no_part():
    head = CaptionHead(8, reader="hash:16")
    texts = ["red apple", "blue car"]
    vectors = head.read(texts)
    with torch.no_grad():
        head.head.weight.copy_(torch.linalg.pinv(torch.eye(8)[:2]).mm(vectors).mT)
        head.head.bias.zero_()
    tokens = torch.eye(8)[:2, None]
    assert head(tokens, texts) < head(tokens, texts[::-1])
    extended = head(torch.cat([tokens, torch.ones(1, 1, 8)]), [*texts, " "])
    torch.testing.assert_close(extended, head(tokens, texts))
    task = TokenFlowTask(vistok.create("tokenflow-tiny"), TokenFlowTaskConfig(captions="hash")).train()
    images = torch.zeros(2, 3, 32, 32)
    loss, _ = task(SimpleNamespace(images=images, captions=texts, labels=torch.tensor([-1, -1])), None, 0)
    loss.backward()
    assert task.caption_head.head.weight.grad.isfinite().all()


@pytest.mark.parametrize("name, part", [("tokenflow-tiny", "semantic"), ("seed-tiny", "generation")])
def test_a_recipe_takes_a_teacher_of_any_width(name, part, images, tmp_path):
    vistok.create("vision-tower-tiny", width=20).save_pretrained(tmp_path)
    task = get_recipe(name, "tokenizer").build(Sources(vae=str(tmp_path))).train()
    task.dataset = SimpleNamespace(classes=[], captions=["red apple", "blue car"])
    batch = SimpleNamespace(images=images, captions=task.dataset.captions, labels=torch.tensor([-1, -1]))
    loss, logs = task(batch, None, 50)
    assert loss.isfinite() and part in logs and "codes" in logs
