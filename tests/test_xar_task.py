"""Training xAR on token folders, and what comes out: a pipeline of labels and captions to pictures."""

import pytest
import torch
from safetensors.torch import load_file

import vistok
from vistok.cli import main
from vistok.data import TokenFolder
from vistok.data.tokenize import tokenize_dataset
from vistok.decoding.flow import code_table
from vistok.generators import FlowSampling, OrderConfig
from vistok.pipelines import TokenImagePipeline
from vistok.rng import image_generators
from vistok.training.recipes import train_generator
from vistok.training.recipes.xar import channel_statistics
from vistok.training.tasks.generator import read_batch
from vistok.training.tasks.xar import XARTask, XARTaskConfig

QUICK = {"max_steps": 2, "save_every": 2, "preview_every": 2, "progress": False, "threads": 1}
CLASSES = ("Cats", "Dogs", "Flowers")


def tokenizer_of(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "vae":
            shape = dict(image_size=(32, 32), latent_channels=3, stem=4, block_channels=(16, 16), layers_per_block=1, norm_groups=8)
            return vistok.create("vae-small", **shape).eval()
        return vistok.create("fsq2d-tiny", image_size=(32, 32)).eval()


def pipeline(kind="vae", text="hash", order="cell-2"):
    tokenizer = tokenizer_of(kind)
    fields = dict(order=OrderConfig.parse(order, tokenizer.layout), code_dim=tokenizer.code_dim, num_classes=3, classes=CLASSES, text=text)
    scaled = dict(value_mean=(0.1,) * tokenizer.code_dim, value_deviation=(0.5,) * tokenizer.code_dim)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = vistok.create("xar-tiny", **fields, **scaled, caption_tokens=3, caption_buckets=64).eval()
    pipe = TokenImagePipeline(generator, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 6 pictures in 2 classes, with captions."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    for number in range(6):
        place = folder / ("cats", "dogs")[number % 2]
        place.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), (40 * number, 90, 255 - 40 * number)).save(place / f"{number}.png")
        (place / f"{number}.txt").write_text(f"picture {number}")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, photos):
    """kind -> (tokenizer folder, token folder), made once."""
    made = {}

    def make(kind):
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            tokenizer = tokenizer_of(kind.removesuffix(", means"))
            tokenizer.save_pretrained(root / "tokenizer")
            dataset = vistok.open_dataset(str(photos), image_size=32, split="all")
            tokenize_dataset(tokenizer, dataset, root / "tokens", flips=True, deviations=not kind.endswith(", means"))
            made[kind] = root / "tokenizer", root / "tokens"
        return made[kind]

    return make


def task_of(folders, kind="vae, means", context="noisy", **config):
    tokenizer, tokens = folders(kind)
    tokenizer, tokens = vistok.load(tokenizer), TokenFolder(tokens)
    mean, deviation = channel_statistics(tokens, code_table(tokenizer))
    order = OrderConfig.parse("cell-2", tokens.layout)
    fields = dict(order=order, code_dim=len(mean), value_mean=mean, value_deviation=deviation, num_classes=2, text="hash")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = vistok.create("xar-tiny", **fields, caption_tokens=3, caption_buckets=64)
    task = XARTask(model, XARTaskConfig(context=context, **config), tokenizer=tokenizer, held_out=tokens)
    task.on_start(tokens)
    return task, tokens


@pytest.mark.parametrize("kind", ["vae, means", "fsq2d"])
def test_the_network_sees_values_of_mean_0_and_deviation_1_and_gives_the_tokens_back(folders, kind):
    task, tokens = task_of(folders, kind)
    batch = read_batch(tokens, range(len(tokens)))
    slots = task.slots(batch, image_generators(0, len(batch)))
    torch.testing.assert_close(slots.mean((0, 1)), torch.zeros(slots.shape[2]), atol=1e-4, rtol=0)
    torch.testing.assert_close(slots.square().mean((0, 1)), torch.ones(slots.shape[2]), atol=1e-3, rtol=0)
    values = task.model.denormalise(task.model.order.unpack(slots))
    torch.testing.assert_close(values, task.codes[batch.ids] if kind == "fsq2d" else batch.values, atol=1e-4, rtol=1e-4)


def test_a_vaes_values_are_drawn_from_their_posteriors_by_each_samples_own_generator(folders, photos):
    task, tokens = task_of(folders, "vae")
    batch = read_batch(tokens, [0, 1, 2], flips=torch.tensor([False, True, False]))
    mean, logvar = task.tokenizer.posterior(vistok.open_dataset(str(photos), image_size=32, split="all").read(0)[None] / 127.5 - 1)
    deviation = torch.exp(0.5 * logvar[0]).flatten(1).T * task.tokenizer.settings.scaling_factor
    torch.testing.assert_close(batch.deviations[0], deviation, atol=1e-3, rtol=1e-3)  # half precision on disk
    drawn = torch.stack([task.slots(batch, image_generators(seed, 3)) for seed in range(400)])
    values = task.model.denormalise(task.model.order.unpack(drawn.flatten(0, 1))).unflatten(0, (400, 3))
    torch.testing.assert_close(values.mean(0), batch.values, atol=0.3, rtol=0)
    torch.testing.assert_close(values.std(0) / batch.deviations, torch.ones_like(batch.deviations), atol=0.2, rtol=0)
    alone = task.slots(read_batch(tokens, [1], flips=torch.tensor([True])), image_generators(0, [1]))
    assert torch.equal(alone, task.slots(batch, image_generators(0, 3))[1:2])
    whole = task.slots(read_batch(tokens, range(6)), image_generators(0, 6))
    assert 0.8 < float(whole.square().mean()) < 1.2  # the statistics count the posteriors' own spread


@pytest.mark.parametrize("context", ["noisy", "clean"])
def test_it_learns_a_few_images_by_heart(folders, context):
    task, tokens = task_of(folders, context=context, condition_dropout=0.0, class_dropout=0.0, caption_dropout=0.0)
    batch, before = read_batch(tokens, range(6)), task.held_out_loss()
    optimizer = torch.optim.Adam(task.parameters(), lr=1e-2)
    for step in range(60):
        loss, _ = task(batch, image_generators(step, 6), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert task.held_out_loss() < 0.6 * before


def test_the_loss_of_an_image_depends_on_its_own_generator_alone(folders):
    task, tokens = task_of(folders, dropout=0.2)
    together = task(read_batch(tokens, range(4)), image_generators(5, 4), 0)[0]
    alone = [task(read_batch(tokens, [i]), image_generators(5, [i]), 0)[0] for i in range(4)]
    torch.testing.assert_close(torch.stack(alone).mean(), together, atol=1e-5, rtol=1e-5)


def test_conditions_are_dropped_and_dropout_keeps_the_mean(folders):
    task, tokens = task_of(folders, condition_dropout=0.5, dropout=0.5)
    batch = read_batch(tokens, [0] * 400)
    condition, keep = task.thin(task.condition(batch), image_generators(0, 400))
    assert 0.5 < (condition.labels < 0).float().mean() < 0.8 and (condition.words[:, 0, 0] < 0).float().mean() > 0.5
    assert keep.shape == (2, 2, 400, 1, 32) and keep.mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("context", ["noisy", "clean"])
def test_the_loss_compiles_in_one_piece(folders, context):
    task, tokens = task_of(folders, context=context, dropout=0.1)
    slots, condition, drawn = task.prepare(read_batch(tokens, range(4)), image_generators(0, 4))
    compiled = torch.compile(task.model.denoising_loss, backend="eager", fullgraph=True)
    expected = task.model.denoising_loss(slots, condition, context=context, **drawn)
    torch.testing.assert_close(compiled(slots, condition, context=context, **drawn), expected)


def test_tokens_that_lie_in_scales_are_made_scale_by_scale(photos, tmp_path):
    vistok.create("var-vqvae-tiny").save_pretrained(tmp_path / "tokenizer")
    run = train_generator("xar-tiny", out=tmp_path / "run", tokenizer=str(tmp_path / "tokenizer"), data=str(photos), **QUICK)
    pipe = vistok.load(run)
    sides = pipe.tokenizer.layout.shape
    assert pipe.generator.order.lengths == tuple(h * w for h, w in sides)
    out = pipe(labels=["cats"], num_steps=2, seed=0)
    assert out.tokens.ids.shape == (1, sum(h * w for h, w in sides))


@pytest.mark.parametrize("kind, order, context", [("vae", "cell-2", "clean"), ("vae", "scale", None), ("fsq2d", "subsample-2", None)])
def test_a_recipe_trains_any_order_from_a_token_folder(folders, tmp_path, kind, order, context):
    tokenizer, tokens = folders(kind)
    run = train_generator("xar-tiny", out=tmp_path / "run", tokenizer=str(tokenizer), tokens=tokens, order=order, context=context, **QUICK)
    pipe = vistok.load(run)
    assert pipe.generator.settings.order == OrderConfig.parse(order, pipe.tokenizer.layout) and pipe.generator.settings.text == "hash"
    out = pipe(labels=["cats", "dogs"], prompts=["picture", "red"], num_steps=2, seed=0)
    assert len(out.images) == 2 and (out.tokens.ids is None) == (kind == "vae")
    assert list((run / "previews").glob("*.png"))


def test_a_recipe_trains_from_a_folder_of_images_and_registers_go_in_groups(photos, tmp_path):
    vistok.create("flextok-tiny").save_pretrained(tmp_path / "tokenizer")
    options = dict(tokenizer=str(tmp_path / "tokenizer"), data=str(photos), order="group-4")
    run = train_generator("xar-tiny", out=tmp_path / "run", **options, **QUICK)
    pipe = vistok.load(run)
    out = pipe(labels=["cats"], num_tokens=8, num_steps=2, seed=0, output_type="pt")
    whole = pipe(labels=["cats"], num_steps=2, seed=0, output_type="pt")
    assert out.tokens.counts.tolist() == [8] and torch.equal(out.tokens.ids[0], whole.tokens.ids[0, :8])
    with pytest.raises(ValueError, match="inside an entity"):
        pipe(labels=["cats"], num_tokens=6, seed=0)


def test_recipes_say_what_they_take(folders, photos, tmp_path):
    tokenizer, tokens = folders("vae")
    with pytest.raises(ValueError, match="order='cell-2' is for xar recipes"):
        train_generator("gpt-tiny", out=tmp_path / "a", tokenizer=str(tokenizer), tokens=tokens, order="cell-2", **QUICK)
    with pytest.raises(ValueError, match="xar recipes learn those"):
        train_generator("gpt-tiny", out=tmp_path / "b", tokenizer=str(tokenizer), data=str(photos), **QUICK)
    with pytest.raises(ValueError, match="does not divide"):
        train_generator("xar-tiny", out=tmp_path / "c", tokenizer=str(tokenizer), tokens=tokens, order="cell-3", **QUICK)
    task, _ = task_of(folders)
    with pytest.raises(ValueError, match="needs their tokenizer"):
        task.check_tokens(TokenFolder(folders("fsq2d")[1]))
    with pytest.raises(ValueError, match="context"):
        XARTaskConfig(context="dirty")


# -- the pipeline ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vae", "fsq2d"])
def test_images_do_not_depend_on_their_batch(kind):
    pipe = pipeline(kind)
    options = dict(labels=["Cats", 2], num_images=2, num_steps=3, guidance_scale=2.0, seed=3, output_type="pt")
    one, three = pipe(**options, batch_size=1), pipe(**options, batch_size=3)
    torch.testing.assert_close(one.images, three.images, atol=1e-4, rtol=0)
    assert one.stats.target_passes == 4 * 3 * 4 and one.stats.num_tokens == 4 * 16  # four images, three steps, four entities
    if kind == "fsq2d":
        assert torch.equal(one.tokens.ids, three.tokens.ids)


@pytest.mark.parametrize("kind", ["vae", "fsq2d"])
def test_the_callback_streams_partial_images_from_which_a_run_goes_on(kind):
    pipe, seen = pipeline(kind), []
    options = dict(prompts=["a red cat", "a dog"], labels=[0, 1], num_steps=2, final_steps=1, seed=1, output_type="pt")
    whole = pipe(**options, callback_on_step_end=lambda p, entity, values: seen.append((entity, values.clone())))
    assert [entity for entity, _ in seen] == [0, 1, 2, 3]
    torch.testing.assert_close(pipe.partial_images(seen[-1][1], output_type="pt"), whole.images, atol=1e-4, rtol=0)
    first = pipe.partial_images(seen[0][1])
    assert len(first) == 2 and first[0].size == (32, 32)
    rest = pipe(**options, prefix=seen[1][1])
    torch.testing.assert_close(rest.images, whole.images, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="prefix is of 2 images, but 1"):
        pipe(labels=[0], prefix=seen[1][1])


def test_steps_solver_and_guidance_reach_the_sampler():
    pipe = pipeline(text="none")
    out = pipe(labels=[1], num_steps=5, final_steps=2, solver="euler", guidance_scale=lambda entity: 1.0, seed=0)
    assert out.stats.target_passes == sum(FlowSampling(num_steps=5, final_steps=2).steps(entity, 4) for entity in range(4))
    again = pipe.generator.sample(
        pipe.generator.make_condition(1, labels=[1]),
        generators=image_generators(0, 1),
        sampling=FlowSampling(num_steps=5, final_steps=2, solver="euler"),
    )
    assert torch.equal(out.tokens.values, again.values)


def test_a_saved_pipeline_makes_the_same_images(tmp_path):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    options = dict(prompts=["a red cat"], num_steps=2, seed=0, output_type="pt")
    assert torch.equal(TokenImagePipeline.from_pretrained(tmp_path)(**options).images, pipe(**options).images)


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(temperature=0.5), "choose among ids"),
        (dict(num_steps=0), "at least 1"),
        (dict(solver="magic"), "euler, euler_maruyama"),
        (dict(guidance_scale=0.5), "at least 1"),
        (dict(num_tokens=8), "images of 16"),
    ],
)
def test_wrong_requests_say_what_is_right(call, message):
    with pytest.raises(ValueError, match=message):
        pipeline(text="none")(labels=[0], **call)


def test_parts_that_do_not_fit_and_options_of_other_generators_are_refused():
    pipe = pipeline()
    with pytest.raises(ValueError, match="not trained together"):
        TokenImagePipeline(vistok.create("xar-tiny"), pipe.tokenizer)
    gpt = TokenImagePipeline(vistok.create("gpt-tiny", layout_shape=(4, 4)).eval(), tokenizer_of("fsq2d"))
    with pytest.raises(ValueError, match="steps of a GPT are its tokens"):
        gpt(num_steps=3)
    with pytest.raises(ValueError, match="solver is of generators of values"):
        gpt(solver="euler")


@pytest.mark.parametrize("kind", ["vae", "fsq2d"])
def test_the_command_writes_tokens_from_which_another_call_goes_on(kind, tmp_path, capsys):
    pipeline(kind).save_pretrained(tmp_path / "model")
    call = ["generate", "--model", str(tmp_path / "model"), "--labels", "Cats", "--num-images", "2", "--num-steps", "2"]
    assert main([*call, "--seed", "0", "--out", str(tmp_path / "a")]) == 0
    prefix = ["--prefix", str(tmp_path / "a" / "tokens.safetensors"), "--prefix-entities", "3"]
    assert main([*call, *prefix, "--seed", "0", "--out", str(tmp_path / "b")]) == 0
    assert main([*call, *prefix, "--seed", "1", "--out", str(tmp_path / "c")]) == 0
    name = "values" if kind == "vae" else "ids"
    a, b, c = (load_file(tmp_path / folder / "tokens.safetensors")[name].float() for folder in "abc")
    torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-4)
    kept = pipeline(kind).generator.order.tokens[:12]
    torch.testing.assert_close(c[:, kept], a[:, kept], atol=1e-4, rtol=1e-4)
    assert not torch.equal(c, a)
    assert main([*call, *prefix[:3], "9", "--out", str(tmp_path / "d")]) == 2 and "allowed: 1 to 4" in capsys.readouterr().err


@pytest.mark.parametrize("name, entities", [("emoji-xar", 4), ("emoji-xar-flextok", 4)])
def test_the_bundled_pipelines_make_pictures(name, entities):
    pipe = TokenImagePipeline.from_pretrained(f"vistok/{name}")
    pipe.set_progress_bar_config(disable=True)
    out = pipe(prompts=["noto: red apple"], labels=["Food & Drink"], num_steps=3, solver="euler", seed=0)
    assert pipe.generator.order.num_entities == entities and out.stats.target_passes == 3 * entities
    assert out.images[0].size == (64, 64) and out.tokens.ids.shape == (1, pipe.generator.max_tokens)
