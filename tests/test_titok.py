import json
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import vistok
from vistok.convert.titok import from_official, to_official
from vistok.quantizers import VQConfig
from vistok.quantizers.clustered import ClusteredVQ
from vistok.rng import image_generators
from vistok.tokenizers.maskgit_vqgan import PixelDecoder, PixelDecoderConfig
from vistok.tokenizers.titok import TiTok
from vistok.training.recipes import get_recipe
from vistok.training.tasks.titok import TiTokTask, TiTokTaskConfig, begin_stage_two

TINY_PIXELS = PixelDecoderConfig(code_dim=8, channels=32, multipliers=(1, 1, 1, 1), blocks=1)


def build(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return vistok.create("titok-tiny", **changes)


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def two_stage(**changes):
    return build(**{"target": "proxy", "proxy_codebook_size": 200, "pixel_decoder": TINY_PIXELS, "interleaved_head": True, **changes})


VARIANTS = {
    "pixels": {},
    "vq": {"quantizer": "vq"},
    "vae": {"quantizer": "vae"},
    "proxy": {"target": "proxy", "pixel_decoder": TINY_PIXELS, "interleaved_head": True},
    "text": {"text_width": 12, "text_tokens": 5},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_goes_to_its_official_form_and_back_bit_equal(name, tmp_path):
    model = build(**VARIANTS[name])
    to_official(model, tmp_path)
    heads = {"encoder_heads": 2, "decoder_heads": 2}
    again = from_official(tmp_path, **heads, entropy_weight=model.settings.entropy_weight)
    assert again.settings == replace(model.settings, codebook_size=again.settings.codebook_size)  # a VAE's is not in the file
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_pickled_checkpoint_is_read_if_it_is_plain_and_refused_if_it_runs_code(tmp_path):
    model = build()
    to_official(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model": state, "step": 3}, tmp_path / "pytorch_model.bin")
    again = from_official(tmp_path, encoder_heads=2, decoder_heads=2)
    assert torch.equal(again.encoder.registers, model.encoder.registers)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(eval))
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        from_official(tmp_path, encoder_heads=2, decoder_heads=2)


def test_a_checkpoint_that_does_not_fit_names_its_keys(tmp_path):
    to_official(build(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["extra.weight"] = torch.zeros(1)
    del state["decoder.ln_post.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing decoder.ln_post.bias(.|\n)*unexpected extra.weight"):
        from_official(tmp_path, encoder_heads=2, decoder_heads=2)
    with pytest.raises(ValueError, match="encoder_heads and decoder_heads"):
        from_official(tmp_path)


def test_a_configuration_that_contradicts_the_weights_is_refused(tmp_path):
    to_official(build(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["vq_model"]["is_legacy"] = True
    with pytest.raises(ValueError, match="is_legacy"):
        from_official(tmp_path / "model.safetensors", config=config)
    with pytest.raises(ValueError, match="crop_size=64"):
        from_official(tmp_path / "model.safetensors", config={"dataset": {"preprocessing": {"crop_size": 64}}})


def test_a_model_without_official_form_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="interleaved_head"):
        to_official(two_stage(interleaved_head=False), tmp_path)


def test_the_interleaved_head_reads_the_same_numbers_in_another_order(images):
    model = build()
    z = model.encode_registers(images)
    model.encoder.interleaved_head = True
    with torch.no_grad():
        assert not torch.allclose(model.encode_registers(images), z)


def test_a_vae_samples_with_generators_and_takes_the_mode_without(images):
    model = build(quantizer="vae").eval()
    mode = model.encode(images).values
    sampled = model.encode(images, generators=image_generators(0, 2)).values
    assert torch.equal(mode, model.encode(images).values) and not torch.equal(mode, sampled)
    assert torch.equal(sampled[1:], model.encode(images[1:], generators=image_generators(0, [1])).values)


def test_the_text_changes_the_picture_and_is_required(images):
    model = build(text_width=12, text_tokens=5).eval()
    tokens = model.encode(images)
    text = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(model.decode(tokens, text=text), model.decode(tokens, text=-text))
    with pytest.raises(ValueError, match="reads text features of shape"):
        model.decode(tokens)
    with pytest.raises(ValueError, match="reads no text"):
        build().eval().decode(tokens, text=text)


def test_wrong_input_is_refused_with_a_reason(images):
    model = build().eval()
    with pytest.raises(ValueError, match="64 x 32"):
        model.encode(torch.zeros(1, 3, 64, 32))
    with pytest.raises(ValueError, match="exactly 16 tokens"):
        model.encode(images, num_tokens=8)
    with pytest.raises(ValueError, match="exactly 16 tokens"):
        model.decode(model.encode(images).truncate(3))
    with pytest.raises(ValueError, match="second stage"):
        two_stage(pixel_decoder=None).eval().decode(model.encode(images))
    with pytest.raises(ValueError, match="decoder_patch_size"):
        two_stage(pixel_decoder=replace(TINY_PIXELS, multipliers=(1, 1)))


def test_certain_logits_give_the_code_itself_to_the_pixel_decoder():
    decoder = PixelDecoder(TINY_PIXELS, 10)
    logits = torch.full((1, 10, 2, 2), -1e4)
    logits[:, 3] = 1e4
    with torch.no_grad():
        torch.testing.assert_close(decoder.soft_codes(logits)[0, :, 1, 1], decoder.codebook.weight[3])
        assert decoder(logits).shape == (1, 3, 16, 16)


def test_dead_codes_of_a_clustered_codebook_move_to_the_data_and_used_ones_stay():
    vq = ClusteredVQ(VQConfig(codebook_size=4, code_dim=2)).train()
    with torch.no_grad():
        vq.codebook.copy_(torch.tensor([[1.0, 0], [0, 1], [90, 90], [-90, 90]]))
    z = torch.tensor([[1.0, 0.1], [0.1, 1.0]]).repeat(200, 1)[None]
    for _ in range(20):
        vq(z)
    assert vq.codebook.abs().max() < 2 and torch.allclose(vq.codebook[0], torch.tensor([1.0, 0.0]), atol=0.1)
    before = vq.codebook.clone()
    vq.eval()(z)
    assert torch.equal(vq.codebook, before)


def step(task, images, number=0):
    batch = SimpleNamespace(images=images)
    return task.train()(batch, image_generators(0, len(images)), number)


def test_one_stage_training_lowers_the_error_and_keeps_tokens_apart(images):
    task = TiTokTask(build())
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    seen = []
    for _ in range(15):
        loss, logs = step(task, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(logs["mse"]))
    assert seen[-1] < 0.5 * seen[0] and {"commitment", "codebook", "entropy"} <= set(logs)
    assert (logs["codes"] > 0).sum() > 2


def test_the_gan_counts_from_its_start_on(images):
    task = TiTokTask(build(quantizer="vq"), TiTokTaskConfig(gan_weight=0.5, gan_start=3))
    early, logs = step(task, images, 2)
    late, _ = step(task, images, 3)
    torch.testing.assert_close(late - early, 0.5 * logs["gan"], atol=1e-4, rtol=1e-4)


def test_two_stages_learn_codes_first_and_pixels_then(images):
    teacher = vistok.create("fsq2d-tiny", image_size=(32, 32), stem=4)
    first = two_stage(pixel_decoder=None)
    task = TiTokTask(first, TiTokTaskConfig(stage="proxy"), teacher=teacher)
    loss, logs = step(task, images)
    loss.backward()
    assert logs["cross_entropy"] > 0 and all(p.grad is None for p in teacher.parameters())
    assert first.encoder.registers.grad.abs().sum() > 0
    second = begin_stage_two(first, replace(first.settings, pixel_decoder=TINY_PIXELS))
    task = TiTokTask(second, TiTokTaskConfig(stage="pixels"))
    loss, logs = step(task, images)
    loss.backward()
    trained = {name.split(".")[0] for name, p in second.named_parameters() if p.grad is not None}
    assert trained == {"decoder", "pixel_decoder"} and "commitment" not in logs
    kept = {key: value for key, value in first.state_dict().items() if not key.startswith("decoder.")}
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in kept.items())


def test_a_task_refuses_a_model_or_teacher_that_does_not_fit(images):
    teacher = vistok.create("fsq2d-tiny")
    with pytest.raises(ValueError, match="needs a teacher"):
        TiTokTask(build(), TiTokTaskConfig(stage="proxy"), teacher=teacher)
    with pytest.raises(ValueError, match="the TiTok predicts a grid"):
        TiTokTask(two_stage(pixel_decoder=None), TiTokTaskConfig(stage="proxy"), teacher=teacher)
    with pytest.raises(ValueError, match="no pixel decoder"):
        TiTokTask(two_stage(pixel_decoder=None))
    for model, text in ((build(text_width=4), None), (build(), "hash")):
        with pytest.raises(ValueError, match="a text-aware TiTok, and no other"):
            TiTokTask(model, TiTokTaskConfig(text=text))


def test_a_text_aware_model_trains_with_its_captions_and_needs_some(images):
    task = TiTokTask(build(text_width=4, text_tokens=3), TiTokTaskConfig(text="hash")).train()
    batch, noise = SimpleNamespace(images=images, captions=["a cat", ""]), image_generators(0, 2)
    loss, _ = task(batch, noise, 0)
    loss.backward()
    assert task.model.decoder.from_text.weight.grad.abs().sum() > 0 and task.model.encoder.head.weight.grad.abs().sum() > 0
    assert not torch.equal(loss, task(SimpleNamespace(images=images, captions=["a dog", ""]), noise, 0)[0])
    with pytest.raises(ValueError, match="reads captions, and this data set has none"):
        task.on_start(SimpleNamespace(captions=["", ""], classes=["a"]))


@pytest.mark.parametrize("name", ["titok-tiny", "titok-tiny-text", "titok-tiny-stage1"])
def test_the_tiny_recipes_build_their_tasks(name):
    from vistok.training.recipes import Sources

    task = get_recipe(name, "tokenizer").build(Sources())
    assert isinstance(task.model, TiTok) and task.describe()["model"] == "TiTok"


def test_stage_two_needs_a_run_of_stage_one():
    from vistok.training.recipes import Sources

    with pytest.raises(ValueError, match="--vae RUN"):
        get_recipe("titok-tiny-stage2", "tokenizer").build(Sources())
