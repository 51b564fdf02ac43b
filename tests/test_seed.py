"""SEED: causal tokens, both decode heads, conversion, pixels, and the two stages of training."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import vistok
from vistok.convert.seed import from_official, to_official
from vistok.data.emoji import EmojiDataset
from vistok.data.loader import make_batch
from vistok.modeling import VisualModel
from vistok.quantizers import VQConfig
from vistok.tokenizers.seed import SEED, SEEDConfig, SEEDLossWeights, SEEDTextConfig
from vistok.training.tasks.contrast import contrastive_loss
from vistok.training.tasks.seed import SEEDTask, SEEDTaskConfig, with_text

HEADS = dict(vision_heads=4, qformer_heads=4, block_heads=4)


def build(**changes) -> SEED:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = vistok.create("seed-tiny", **changes).eval()
        for parameter in model.parameters():  # the small start of BERT hides what its biases and norms do
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def random_images(count: int, size: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


# -- the model --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [True, False])
@torch.no_grad()
def test_a_register_sees_only_earlier_ones_where_the_qformer_is_causal(is_causal):
    model, images = build(is_causal=is_causal), random_images(2)
    before = model.causal_embeddings(images)
    model.qformer.registers.data[5].neg_()
    after = model.causal_embeddings(images)
    changed = (after - before).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == ([False] * 5 + [True] * 3 if is_causal else [True] * 8)


def test_images_of_another_size_are_resized():
    model = build()
    assert model.encode(random_images(2, 48)).ids.shape == (2, 8)
    with pytest.raises(ValueError, match="num_tokens=4 but SEED makes exactly 8 tokens"):
        model.encode(random_images(1), num_tokens=4)


def test_both_heads_make_embeddings_of_the_same_width():
    codes = build().embed(torch.arange(16).view(2, 8))
    for head in ("mlp", "reverse"):
        out = build(head=head, reverse_depth=2).generation_embedding(codes)
        assert out.shape == (2, 64) and not torch.allclose(out[0], out[1])


def test_bad_configs_are_errors():
    for change in (
        {"image_size": (30, 32)}, {"num_registers": 0}, {"head_widths": ()}, {"reverse_depth": 0}, {"head": "linear"}, {"block_depth": -1},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            SEED.from_config({**vistok.create("seed-tiny").config, **change})


@pytest.mark.slow
def test_the_released_shape_has_the_released_number_of_parameters():
    with torch.device("meta"):
        model = SEED(SEEDConfig())
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 1150


def test_a_text_branch_is_needed_for_texts_only():
    model = build()
    with pytest.raises(ValueError, match="no text branch"):
        model.image_direction(torch.zeros(1, 8, 48))
    with pytest.raises(ValueError, match="no text branch"):
        model.text_states(torch.zeros(1, 4, 48))
    with_words = build(text=SEEDTextConfig(vocab_size=10, max_words=6, embedding_dim=16))
    states = with_words.text_states(with_words.text.embed(torch.arange(6)[None]))
    assert states.shape == (1, 6, 48) and abs(float(with_words.text_direction(states).detach().norm()) - 1) < 1e-5
    with pytest.raises(ValueError, match="at most 6 words fit"):
        with_words.text.embed(torch.zeros(1, 7, dtype=torch.int64))


@torch.no_grad()
def test_padded_words_do_not_change_a_text():
    model = build(text=SEEDTextConfig(vocab_size=10, max_words=6, embedding_dim=16))
    ids = torch.tensor([[3, 4, 5, 0, 0]])
    padded = model.text_states(model.text.embed(ids), ids > 0)
    torch.testing.assert_close(padded[:, :3], model.text_states(model.text.embed(ids[:, :3])), atol=1e-5, rtol=0)


# -- pixels -----------------------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_a_pixel_decoder_says_what_it_needs():
    model = build(pixels=None)
    tokens = model.encode(random_images(1))
    with pytest.raises(ValueError, match="StableUnCLIPImg2ImgPipeline"):
        model.decode(tokens)
    with pytest.raises(ValueError, match="StableUnCLIPImg2ImgPipeline"):
        model.decode(tokens, unclip=object())
    with pytest.raises(TypeError, match="num_steps"):
        build().decode(tokens, num_steps=3)
    with pytest.raises(ValueError, match="exactly 8 tokens"):
        model.decode(tokens.truncate(4))


@pytest.fixture(scope="module")
def unclip(tmp_path_factory):
    """A tiny Stable unCLIP, from nothing but configs."""
    transformers = pytest.importorskip("transformers")
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableUnCLIPImg2ImgPipeline, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from tokenizers import Tokenizer, models

    core = Tokenizer(models.WordLevel({"<end>": 0, "<unk>": 1}, unk_token="<unk>"))
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<end>", model_max_length=4)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableUnCLIPImg2ImgPipeline(
            feature_extractor=transformers.CLIPImageProcessor(crop_size=16, size=16),
            image_encoder=transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)),
            image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=64),
            image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            tokenizer=words,
            text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, vocab_size=8, max_position_embeddings=4)),
            unet=UNet2DConditionModel(
                sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=2, class_embed_type="projection", projection_class_embeddings_input_dim=128,
            ),
            scheduler=DDIMScheduler(num_train_timesteps=50),
            vae=AutoencoderKL(
                block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4,
                down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            ),
        )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_diffusers_unclip_pipeline_draws_the_generation_embedding(unclip):
    model = build(pixels=None)
    tokens = model.encode(random_images(3))
    options = dict(unclip=unclip, num_steps=2, image_size=(24, 24))
    out = model.decode(tokens, generators=vistok.image_generators(0, 3), **options)
    assert out.shape == (3, 3, 24, 24) and out.isfinite().all() and out.min() >= -1 and out.max() <= 1
    alone = model.decode(tokens[1], generators=vistok.image_generators(0, [1]), **options)
    torch.testing.assert_close(alone[0], out[1], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="embeddings of width 64, this tokenizer makes 32"):
        build(pixels=None, embedding_dim=32).decode(tokens, **options)


# -- conversion -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["mlp", "reverse"])
def test_the_official_format_holds_either_head(head, tmp_path):
    model = build(
        head=head, reverse_depth=3, pixels=None, text=SEEDTextConfig(vocab_size=9, max_words=5, embedding_dim=16), is_causal=False
    )
    for block in model.vision.blocks:  # a bias on the keys changes nothing, and is left out
        block.attention.qkv.bias.data[48:96] = 0
    to_official(model, tmp_path)
    keys = torch.load(tmp_path / "seed_quantizer.pt", weights_only=True)
    assert ("image_down.0.weight" in keys) == (head == "mlp") and ("reverse_tokens" in keys) == (head == "reverse")
    assert ("Reverse_Qformer.bert.encoder.layer.2.crossattention.self.key.weight" in keys) == (head == "reverse")
    assert "Reverse_Qformer.bert.encoder.layer.1.crossattention.self.key.weight" not in keys
    again = from_official(tmp_path, **HEADS)
    expected = model.settings if head == "reverse" else replace(model.settings, reverse_depth=again.settings.reverse_depth)
    expected = expected if head == "mlp" else replace(expected, head_widths=again.settings.head_widths)
    assert again.settings == expected
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@torch.no_grad()
def test_a_key_bias_that_training_made_changes_nothing_and_is_not_written(tmp_path):
    model = build(pixels=None)
    to_official(model, tmp_path)
    again = from_official(tmp_path, **HEADS, is_causal=True)
    assert not torch.equal(model.vision.blocks[0].attention.qkv.bias, again.vision.blocks[0].attention.qkv.bias)
    torch.testing.assert_close(again.causal_embeddings(random_images(2)), model.causal_embeddings(random_images(2)), atol=1e-4, rtol=0)


def test_registers_are_causal_at_exactly_32_as_in_the_reference(tmp_path):
    for count in (32, 31):
        to_official(build(pixels=None, num_registers=count), tmp_path)
        assert from_official(tmp_path, **HEADS).settings.is_causal == (count == 32)


def test_keys_that_do_not_fit_are_named(tmp_path):
    to_official(build(pixels=None), tmp_path)
    file = tmp_path / "seed_quantizer.pt"
    state = torch.load(file, weights_only=True)
    torch.save({**state, "itm_head.weight": torch.zeros(2, 2), "Qformer.cls.predictions.bias": torch.zeros(3)}, file)
    from_official(tmp_path, **HEADS)  # heads that neither stage uses
    del state["ln_vision.weight"]
    torch.save({**state, "blocks.0.norm3.weight": torch.zeros(1), "encode_task_layer.0.bias": torch.zeros(3)}, file)
    with pytest.raises(ValueError) as error:
        from_official(tmp_path, **HEADS)
    for problem in ("missing ln_vision.weight", "unexpected blocks.0.norm3.weight", "encode_task_layer.0.bias has shape (3,)"):
        assert problem in str(error.value)
    torch.save({"query_tokens": torch.zeros(1, 8, 48)}, file)
    with pytest.raises(ValueError, match="is no SEED tokenizer"):
        from_official(tmp_path)


class Trap:
    def __reduce__(self):
        return (print, ("a pickle ran code",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    torch.save({"query_tokens": Trap()}, tmp_path / "seed_quantizer.pt")
    with pytest.raises(ValueError, match="not opened"):
        from_official(tmp_path)


def test_a_pixel_decoder_has_no_place_in_the_official_format(tmp_path):
    with pytest.raises(ValueError, match="no place for a pixel decoder"):
        to_official(build(), tmp_path)
    to_official(build(), tmp_path, without_pixels=True)
    assert from_official(tmp_path, **HEADS).pixels is None


# -- training ---------------------------------------------------------------------------------------------------------------------------


def test_the_contrastive_loss_is_the_symmetric_cross_entropy_where_all_texts_differ():
    images, texts = (F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)), dim=1) for seed in (0, 1))
    logits, rows = images @ texts.t() / 0.1, torch.arange(5)
    expected = (F.cross_entropy(logits, rows, label_smoothing=0.1) + F.cross_entropy(logits.t(), rows, label_smoothing=0.1)) / 2
    torch.testing.assert_close(contrastive_loss(images, texts, 0.1), expected)
    torch.testing.assert_close(contrastive_loss(images, texts, 0.1, groups=torch.tensor([9, 3, 7, 2, 5])), expected)


def test_images_without_a_text_take_no_part_and_equal_texts_are_one_answer():
    images, texts = (F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)), dim=1) for seed in (0, 1))
    partly = contrastive_loss(images, texts, 0.1, groups=torch.tensor([1, -1, 2, 3, -1]))
    kept = torch.tensor([0, 2, 3])
    torch.testing.assert_close(partly, contrastive_loss(images[kept], texts[kept], 0.1))
    assert contrastive_loss(images, texts, 0.1, groups=torch.full((5,), -1)) == 0
    same = contrastive_loss(images, images[:1].expand(5, -1), 1.0, groups=torch.ones(5, dtype=torch.int64), label_smoothing=0.0)
    torch.testing.assert_close(same, torch.tensor(5.0).log().expand_as(same) + 0 * same, atol=0.2, rtol=0)


def contrast_in_a_process(rank: int, folder: str) -> None:
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    images, texts, groups = torch.load(f"{folder}/inputs.pt", weights_only=True)
    rows = slice(3 * rank, 3 * rank + 3)
    ours = images[rows].clone().requires_grad_()
    losses = contrastive_loss(ours, texts[rows], 0.1), contrastive_loss(ours, texts[rows], 0.1, groups=groups[rows])
    losses[0].backward()
    torch.save([*(loss.detach() for loss in losses), ours.grad], f"{folder}/out{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_contrast_with_the_texts_of_both(tmp_path):
    images, texts = (F.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)), dim=1) for seed in (0, 1))
    groups = torch.tensor([1, 2, 3, 3, 4, 5])
    torch.save([images, texts, groups], tmp_path / "inputs.pt")
    torch.multiprocessing.spawn(contrast_in_a_process, args=(str(tmp_path),), nprocs=2)
    out = [torch.load(tmp_path / f"out{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close((out[0][0] + out[1][0]) / 2, contrastive_loss(images, texts, 0.1))
    torch.testing.assert_close((out[0][1] + out[1][1]) / 2, contrastive_loss(images, texts, 0.1, groups=groups))
    assert all(float(gradient.abs().sum()) > 0 for *_, gradient in out)


@pytest.fixture(scope="module")
def dataset():
    return EmojiDataset(image_size=32)


def batch_of(dataset, rows):
    pixels = torch.stack([dataset.read(row) for row in rows])
    indices = torch.tensor(rows)
    labels = torch.tensor([dataset.labels[row] for row in rows])
    return make_batch(pixels, labels, [dataset.captions[row] for row in rows], indices, indices.numpy(), seed=0, flip=False, shift=0)


def task_of(dataset, model=None, **config):
    task = SEEDTask(build() if model is None else model, SEEDTaskConfig(**config))
    task.dataset = dataset
    task.on_start(dataset)
    return task.train()


def trained_parts(task, dataset, step):
    task.zero_grad()
    loss, logs = task(batch_of(dataset, [0, 5, 9, 20]), None, step)
    loss.backward()
    names = {name.split(".")[1] for name, p in task.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    return names, logs


def test_stage_one_trains_the_encoder_and_stage_two_the_rest(dataset):
    task = task_of(dataset, contrast_steps=3, frozen_encoder=True)
    names, logs = trained_parts(task, dataset, 2)
    assert set(logs) == {"contrast"} and {"vision", "qformer", "text"} <= names and not {"to_code", "pixels", "head"} & names
    names, logs = trained_parts(task, dataset, 3)
    assert {"vq", "semantic", "pixels", "codes"} == set(logs)
    assert {"to_code", "from_code", "semantic_blocks", "generation_blocks", "head", "pixels"} <= names and not {"vision", "qformer"} & names


def test_the_encoder_can_go_on_learning_with_some_contrast(dataset):
    task = task_of(dataset, contrast_steps=1, frozen_encoder=False, joint_contrast_weight=0.1)
    names, logs = trained_parts(task, dataset, 1)
    assert {"vision", "qformer", "text", "to_code", "pixels"} <= names and {"contrast", "vq", "semantic", "pixels", "codes"} == set(logs)
    with pytest.raises(ValueError, match="frozen_encoder=False"):
        SEEDTaskConfig(joint_contrast_weight=0.1)


def test_the_saved_tokenizer_has_no_text_branch(dataset, tmp_path):
    task = task_of(dataset, contrast_steps=1)
    assert task.model.text is not None
    task.save_pretrained(tmp_path)
    saved, images = vistok.load(tmp_path), random_images(2)
    assert saved.text is None and torch.equal(saved.encode(images).ids, task.model.eval().encode(images).ids)
    assert torch.equal(with_text(task.model, None).state_dict()["head.proj.weight"], task.model.head.proj.weight)


def test_stage_one_needs_captions_or_classes(dataset):
    class Bare(type(dataset)):
        pass

    bare = Bare(image_size=32)
    bare.captions, bare.classes, bare.labels = [""] * len(bare), [], [-1] * len(bare)
    with pytest.raises(ValueError, match="neither captions"):
        task_of(bare, contrast_steps=1)
    task_of(bare, contrast_steps=0)
    classes = Bare(image_size=32)
    classes.captions = [""] * len(classes)
    task = task_of(classes, contrast_steps=1)
    assert task.texts(batch_of(classes, [0, 5]))[0] == classes.classes[classes.labels[0]]


def test_a_frozen_clip_tower_teaches_the_generation_embedding(dataset, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    for width in (64, 32):
        transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**sizes, projection_dim=width)).save_pretrained(
            tmp_path / str(width)
        )
    task = task_of(dataset, teacher=str(tmp_path / "64"), frozen_vision=True)
    names, logs = trained_parts(task, dataset, 0)
    assert "generation" in logs and not any(p.requires_grad for p in task.teacher.parameters()) and not task.teacher.training
    assert not any(p.requires_grad for p in task.model.vision.parameters())
    with pytest.raises(ValueError, match="embeddings of width 32, the model of 64"):
        SEEDTask(build(), SEEDTaskConfig(teacher=str(tmp_path / "32")))


def test_a_transformers_text_model_can_read_the_captions(dataset, tmp_path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "red": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>").save_pretrained(tmp_path)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(tmp_path)
    names, logs = trained_parts(task_of(dataset, contrast_steps=1, text=str(tmp_path)), dataset, 0)
    assert "contrast" in logs and {"vision", "text", "caption"} <= names


def test_a_few_steps_lower_the_loss_of_either_stage(dataset):
    quantizer = VQConfig(codebook_size=128, code_dim=8, update="ema", commitment_weight=1.0, kmeans_iterations=3)
    weights = SEEDLossWeights(vq=1.0, semantic=0.5)
    task = task_of(dataset, build(quantizer=quantizer), contrast_steps=12, frozen_encoder=False, weights=weights)
    optimizer = torch.optim.AdamW(task.parameters(), lr=2e-3)
    batch, losses = batch_of(dataset, list(range(0, 64, 4))), []
    for step in range(24):
        loss, _ = task(batch, None, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[11] < losses[0] and losses[23] < losses[13]


def test_seed_is_a_visual_model_like_any_other(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    again = vistok.load(tmp_path)
    assert isinstance(again, VisualModel) and again.settings == model.settings
    assert torch.equal(again.decode(again.encode(random_images(1))), model.decode(model.encode(random_images(1))))
