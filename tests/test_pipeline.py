import json

import pytest
import torch
from PIL import Image
from token_toys import token_folder

import vistok
from vistok import rng
from vistok.pipelines import TokenImagePipeline
from vistok.training import TrainConfig, train
from vistok.training.tasks.generator import GeneratorTask, GeneratorTaskConfig


def build(**overrides):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = vistok.create("fsq2d-tiny", image_size=(32, 32)).eval()
        options = {"num_classes": 3, "classes": ("Cats", "Dogs", "Flowers"), "text": "hash", **overrides}
        generator = vistok.create("gpt-tiny", codebook_size=200, layout_shape=tokenizer.layout.shape, **options).eval()
    pipe = TokenImagePipeline(generator, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return build()


def same(a, b):
    return torch.equal(a.tokens.ids, b.tokens.ids) and torch.equal(a.images, b.images)


def test_labels_become_pictures_with_tokens_and_stats(pipe):
    out = pipe(labels=["Cats", 2], num_images=2, seed=0)
    assert len(out.images) == 4 and isinstance(out.images[0], Image.Image) and out.images[0].size == (32, 32)
    assert out.tokens.ids.shape == (4, 16) and out.seed == 0
    assert out.stats.num_images == 4 and out.stats.target_passes == 16 and out.stats.tokens_per_second > 0


def test_prompts_alone_both_and_neither_generate(pipe):
    prompts = pipe(prompts=["a red cat", "a dog"], seed=0, output_type="pt")
    both = pipe(prompts=["a red cat", "a dog"], labels=[0, 1], seed=0, output_type="pt")
    neither = pipe(num_images=2, seed=0, output_type="pt")
    assert prompts.images.shape == both.images.shape == neither.images.shape == (2, 3, 32, 32)
    assert not same(prompts, both)
    with pytest.raises(ValueError, match="as many of both"):
        pipe(prompts=["a"], labels=[0, 1])


def test_the_result_does_not_depend_on_the_batch_size(pipe):
    one, three = (pipe(labels=[0, 1], num_images=2, seed=3, batch_size=size, output_type="pt") for size in (1, 3))
    assert torch.equal(one.tokens.ids, three.tokens.ids)
    assert torch.allclose(one.images, three.images, atol=1e-5)
    assert one.stats.target_passes == 4 * 16 and three.stats.target_passes == 2 * 16


def test_images_go_on_from_their_first_tokens_as_if_unbroken(pipe):
    options = dict(labels=[0, 1], num_images=2, seed=5, output_type="pt")
    whole = pipe(**options)
    seen = []
    rest = pipe(**options, batch_size=3, prefix=whole.tokens.ids[:, :6], callback_on_step_end=lambda p, step, ids: seen.append(step))
    assert torch.equal(rest.tokens.ids, whole.tokens.ids) and min(seen) == 6
    assert torch.allclose(rest.images, whole.images, atol=1e-5)
    with pytest.raises(ValueError, match="of 3 images, but 4"):
        pipe(**options, prefix=whole.tokens.ids[:3, :6])
    with pytest.raises(ValueError, match="plain decoding"):
        pipe(**options, prefix=whole.tokens.ids[:, :6], drafter="jacobi")


def test_a_seed_is_the_generators_it_stands_for_and_is_returned_when_drawn(pipe):
    by_seed = pipe(labels=[0], num_images=2, seed=7, output_type="pt")
    by_generators = pipe(labels=[0], num_images=2, generators=rng.image_generators(7, 2), output_type="pt")
    assert same(by_seed, by_generators) and by_generators.seed is None
    drawn = pipe(labels=[0], output_type="pt")
    assert same(drawn, pipe(labels=[0], seed=drawn.seed, output_type="pt"))
    with pytest.raises(ValueError, match="list of 2"):
        pipe(labels=[0], num_images=2, generators=rng.image_generators(7, 3))


def test_output_types_show_the_same_picture(pipe):
    pil, pt, array = (pipe(labels=[0], seed=1, output_type=kind).images for kind in ("pil", "pt", "np"))
    assert 0 <= pt.min() and pt.max() <= 1
    assert torch.equal(torch.from_numpy(array).permute(0, 3, 1, 2), pt)
    assert abs(torch.tensor(pil[0].getpixel((3, 5))) / 255 - pt[0, :, 5, 3]).max() < 0.003
    with pytest.raises(ValueError, match="pil, pt, np"):
        pipe(labels=[0], output_type="jpg")


def test_the_callback_sees_every_token(pipe):
    seen = []
    out = pipe(labels=[0], seed=0, callback_on_step_end=lambda p, step, ids: seen.append((p is pipe, step, ids.clone())))
    assert [step for _, step, _ in seen] == list(range(16)) and all(is_pipe for is_pipe, _, _ in seen)
    assert all(torch.equal(ids, out.tokens.ids[:, : step + 1]) for _, step, ids in seen)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(labels=["Flower"]), "did you mean 'Flowers'"),
        (dict(labels=[3]), "0 to 2"),
        (dict(labels="Cats"), "must be a list"),
        (dict(labels=[]), "empty"),
        (dict(prompts=[""]), "words"),
        (dict(labels=[0], num_images=0), "num_images"),
        (dict(labels=[0], num_tokens=8), "images of 16"),
        (dict(labels=[0], top_p=0.0), "top_p"),
    ],
)
def test_wrong_requests_say_what_is_right(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        pipe(**call)


def test_class_names_are_found_in_any_case(pipe):
    assert pipe.class_number("cats") == 0 and pipe.class_number("Flowers") == 2


def test_a_generator_without_captions_or_classes_says_so():
    with pytest.raises(ValueError, match="use labels"):
        build(text="none")(prompts=["cat"])
    with pytest.raises(ValueError, match="use prompts"):
        build(num_classes=0, classes=())(labels=[0])


def test_parts_of_different_codebooks_are_refused(pipe):
    with pytest.raises(ValueError, match="not trained together"):
        TokenImagePipeline(vistok.create("gpt-tiny", codebook_size=64), pipe.tokenizer)


def test_a_saved_pipeline_makes_the_same_images(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["generator"] == ["vistok", "GPT"] and index["tokenizer"] == ["vistok", "FSQ2D"]
    expected = pipe(labels=[1], prompts=["dog"], num_images=2, seed=4, output_type="pt")
    for again in (TokenImagePipeline.from_pretrained(tmp_path), vistok.load(tmp_path)):
        again.set_progress_bar_config(disable=True)
        assert again.classes == pipe.classes
        assert same(again(labels=[1], prompts=["dog"], num_images=2, seed=4, output_type="pt"), expected)
    half = TokenImagePipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert half.generator.dtype == half.tokenizer.dtype == torch.float16


def test_a_referenced_tokenizer_is_not_copied(pipe, tmp_path):
    pipe.tokenizer.save_pretrained(tmp_path / "tok")
    pipe.save_pretrained(tmp_path / "pipe", tokenizer_reference="../tok", dtype=torch.float16)
    assert not (tmp_path / "pipe" / "tokenizer").exists()
    again = TokenImagePipeline.from_pretrained(tmp_path / "pipe")
    assert torch.equal(again.tokenizer.state_dict()["decoder.0.weight"], pipe.tokenizer.state_dict()["decoder.0.weight"])
    given = TokenImagePipeline.from_pretrained(tmp_path / "pipe", tokenizer=pipe.tokenizer)
    assert given.tokenizer is pipe.tokenizer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generator": ["os", "system"]}, "ClassName"),
        ({"generator": ["vistok", "Popen"]}, "not a vistok model class"),
        ({"safety_checker": ["vistok", "GPT"]}, "safety_checker"),
        ({"_class_name": "StableDiffusionPipeline"}, "does not describe"),
        ({"_module": "evil"}, "_module"),
    ],
)
def test_an_index_that_names_anything_else_is_refused(pipe, tmp_path, change, message):
    pipe.save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        TokenImagePipeline.from_pretrained(tmp_path)


def test_a_missing_folder_is_an_error_that_says_what_a_model_is(tmp_path):
    with pytest.raises(OSError, match="is no folder"):
        TokenImagePipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(OSError, match="no pipeline folder"):
        TokenImagePipeline.from_pretrained(tmp_path)


def test_a_trained_run_loads_as_a_pipeline_and_shows_previews(pipe, tmp_path):
    tokens = pipe(num_images=4, seed=0).tokens
    folder = token_folder(tmp_path / "tokens", tokens, codebook_size=200, captions=["", "a", "b", "c"], classes=pipe.classes)
    fresh = build()
    task = GeneratorTask(fresh.generator, GeneratorTaskConfig(preview_images=2), tokenizer=fresh.tokenizer)
    config = TrainConfig(out=tmp_path / "run", max_steps=1, batch_size=2, preview_every=1, progress=False)
    train(task, folder, config)
    assert list((tmp_path / "run" / "previews").glob("*samples.png"))
    again = TokenImagePipeline.from_pretrained(tmp_path / "run")
    assert torch.equal(again.tokenizer.state_dict()["decoder.0.weight"], pipe.tokenizer.state_dict()["decoder.0.weight"])
    assert not torch.equal(again.generator.head.weight, pipe.generator.head.weight)
