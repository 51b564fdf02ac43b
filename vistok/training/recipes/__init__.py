"""Recipes: a name for a model, its losses and its training settings, as plain functions.

`vistok train tokenizer --recipe NAME` and `train/tokenizer.py` run them; a copy of a function, changed, is a new recipe. "tiny" recipes
take seconds on a CPU and show that everything works; their pictures are not worth looking at.
"""

import difflib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from vistok.training.checkpoint import write_json
from vistok.training.config import TrainConfig
from vistok.training.loop import seeded_build, train
from vistok.training.task import TrainingTask

logger = logging.getLogger("vistok")


@dataclass(frozen=True)
class Sources:
    """What a recipe is built from besides images: names or folders of trained models, and tokens."""

    vae: str | None = None
    """The VAE under a FlexTok."""
    image_size: int | None = None
    """Pixels the tokenizer is built for; None: the recipe's."""
    num_images: int | None = None
    """Images a tokenizer is trained on; None: as many as its codebook can use."""
    tokenizer: str | None = None
    """The tokenizer of a generator."""
    tokens: Any = None
    """TokenFolder a generator trains on."""
    order: str | None = None
    """The order of an xAR ("cell-2"); None: what suits the tokens."""
    context: str | None = None
    """How an xAR sees earlier entities in training; None: noisy."""
    start: str | None = None
    """A trained GPT, or pipeline or run of one, whose weights a new run starts from; None: fresh ones."""
    grow: int | None = None
    """Parameter tokens that each attention layer of `start` gains first, others in proportion; None: none."""
    held_out: Any = None
    """TokenFolder or images that are held out, to measure a generator or classifier on."""
    dataset: Any = None
    """The images a classifier is trained on."""
    architecture: str | None = None
    """Model of timm for a classifier; None: the recipe's."""
    teacher: str | None = None
    """A classifier to learn from."""
    target: Any = None
    """What a drafter or pruner is trained for, its name, and, of a pruner, the share of tokens to keep."""


@dataclass(frozen=True)
class Recipe:
    """train: its settings; build: (sources) -> the task; num_tokens: tokens an image a generator is trained on, None for all.

    takes: what a generator's recipe can be given besides: "order", "context", "start", "grow", and "values", a continuous tokenizer's
    tokens.
    """

    kind: Literal["tokenizer", "generator", "classifier", "vlm", "teacher", "drafter", "pruner"]
    train: TrainConfig
    build: Callable[[Sources], TrainingTask]
    num_tokens: int | None = None
    takes: frozenset[str] = frozenset()


RECIPES: dict[str, Callable[[], Recipe]] = {}


def recipe(function: Callable[[], Recipe]) -> Callable[[], Recipe]:
    """Decorator: register a recipe under its function's name, with dashes."""
    RECIPES[function.__name__.replace("_", "-")] = function
    return function


def get_recipe(name: str, kind: str | None = None) -> Recipe:
    """The recipe of that name. Raises ValueError: there is none, or it is of another kind."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, 1)
        raise ValueError(f"no recipe {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; recipes: {', '.join(RECIPES)}"))
    found = RECIPES[name]()
    if kind is not None and found.kind != kind:
        raise ValueError(f"{name!r} trains a {found.kind}: vistok train {found.kind} --recipe {name}")
    return found


def train_tokenizer(name: str, *, out: Path, vae: str | None = None, resume: bool = False, **overrides) -> Path:
    """Run a tokenizer recipe; overrides replace fields of its TrainConfig. Returns the run folder."""
    from vistok.data import open_dataset

    chosen = get_recipe(name, "tokenizer")
    config = replace(chosen.train, out=Path(out), **overrides)
    dataset = open_dataset(config.data, image_size=config.image_size, on_bad_image=config.on_bad_image)
    sources = Sources(vae=vae, image_size=overrides.get("image_size"), num_images=len(dataset))
    task = seeded_build(lambda: chosen.build(sources), config.seed)
    return train(task, dataset, config, resume=resume, recipe_name=name)


def train_generator(
    name: str,
    *,
    out: Path,
    tokenizer: str,
    tokens: Path | None = None,
    order: str | None = None,
    context: str | None = None,
    start: str | None = None,
    grow: int | None = None,
    resume: bool = False,
    **overrides,
) -> Path:
    """Run a generator recipe on the tokens of `data` made by `tokenizer`; overrides replace fields of its TrainConfig.

    tokens: a folder made by `vistok tokenize`; without it the data set is tokenized first, into a folder `out`-tokens beside the run.
    order, context: of an xAR, start, grow: of a GPT, see Sources.
    Returns the run folder. Raises ValueError: the recipe takes no such option, or no continuous tokens.
    """
    import vistok
    from vistok.data import TokenFolder

    chosen = get_recipe(name, "generator")
    config = replace(chosen.train, out=Path(out), **overrides)
    given = {"order": order, "context": context, "start": start, "grow": grow}
    for option, value in given.items():
        if value is not None and option not in chosen.takes:
            raise ValueError(f"{option}={value!r} is for {'xar' if option in ('order', 'context') else 'gpt'} recipes; {name} has none")
    if grow is not None and start is None:
        raise ValueError(f"grow={grow} needs a trained generator to add to: give start")
    held_out = None
    if tokens is None:
        model = vistok.load(tokenizer)
        if not hasattr(model, "encode"):
            raise ValueError(f"{tokenizer} is a {type(model).__name__}, not a tokenizer")
        if model.codebook_size is None and "values" not in chosen.takes:
            raise ValueError(f"{name} learns ids, but {tokenizer} makes continuous values; the xar recipes learn those")
        config = replace(config, image_size=int(model.settings.image_size[0]))
        token_folder = _tokenized(model, config, "train", chosen.num_tokens)
        try:
            held_out = _tokenized(model, config, "test", chosen.num_tokens)
        except ValueError as error:  # a small folder can be without a test split
            logger.warning("no held-out loss: %s", error)
    else:
        token_folder = TokenFolder(tokens)
    sources = Sources(tokenizer=tokenizer, tokens=token_folder, held_out=held_out, **given)
    task = seeded_build(lambda: chosen.build(sources), config.seed)
    return train(task, token_folder, config, resume=resume, recipe_name=name)


def _tokenized(model: Any, config: TrainConfig, split: str, num_tokens: int | None) -> Any:
    """The tokens of one split of config.data, made or found beside the run."""
    from vistok.data import open_dataset
    from vistok.data.tokenize import tokenize_dataset

    dataset = open_dataset(config.data, image_size=model.settings.image_size, split=split, on_bad_image=config.on_bad_image)
    target = config.out.parent / f"{config.out.name}-tokens" / split
    tokens = tokenize_dataset(model, dataset, target, num_tokens=num_tokens, flips=config.flip, source=config.data)
    if len(dataset.bad_images):
        write_json(target / "bad_images.json", dataset.bad_images.to_dict())
        logger.warning("unreadable images: %d; %s lists them", len(dataset.bad_images), target / "bad_images.json")
    return tokens


# -- tokenizers -----------------------------------------------------------------------------------------------------------------------


@recipe
def fsq2d_tiny() -> Recipe:
    """A convolutional tokenizer for 32 px images; about 10 seconds on two CPU cores."""
    return Recipe("tokenizer", _tiny(image_size=32, max_steps=60), _fsq2d("fsq2d-tiny", image_size=(32, 32)))


@recipe
def fsq2d_emoji() -> Recipe:
    """The quick baseline: 64 tokens of 1,000 codes for 64 px images; 3 to 4 minutes on two CPU cores, about 22 dB."""
    config = TrainConfig(
        out=Path(), data="emoji", image_size=64, max_steps=1200, batch_size=32, learning_rate=2e-3, betas=(0.9, 0.95), weight_decay=0.01,
        warmup_steps=50, schedule="trapezoid", decay_fraction=0.4, final_fraction=0.02, ema_decay=0.99, shift=4, save_every=200,
        preview_every=200,
    )  # fmt: skip
    return Recipe("tokenizer", config, _fsq2d("fsq2d-64"))


@recipe
def vae_tiny() -> Recipe:
    """A KL-VAE for 32 px images; about 10 seconds on two CPU cores."""
    shape = dict(image_size=(32, 32), latent_channels=4, stem=4, block_channels=(16, 32), layers_per_block=1, norm_groups=8)
    return Recipe("tokenizer", _tiny(image_size=32, max_steps=40), _vae(shape, kl_weight=1e-3))


@recipe
def vae_emoji() -> Recipe:
    """The KL-VAE under emoji-flextok: 64 px to 8 x 8 x 8 latents; about 10 minutes on one CPU core."""
    config = TrainConfig(
        out=Path(), data="emoji", image_size=64, max_steps=2000, batch_size=16, learning_rate=1.5e-3, betas=(0.9, 0.95), weight_decay=0.01,
        warmup_steps=50, schedule="trapezoid", decay_fraction=0.4, final_fraction=0.02, ema_decay=0.99, shift=4, save_every=200,
        preview_every=200,
    )  # fmt: skip
    return Recipe("tokenizer", config, _vae(VAE_EMOJI, kl_weight=1e-3))


@recipe
def vae_imagenet256() -> Recipe:
    """A KL-VAE of the published shape (f8, 16 channels) with LPIPS and a PatchGAN, for folders of 256 px photos; days on 8 large GPUs."""
    config = TrainConfig(
        out=Path(), data="imagenet/train", image_size=256, max_steps=500_000, batch_size=256, learning_rate=1e-4, betas=(0.9, 0.95),
        warmup_steps=1000, ema_decay=0.9999, precision="bf16", compile=True, workers=8, save_every=5000, preview_every=5000,
        process_timeout=600,
    )  # fmt: skip
    return Recipe("tokenizer", config, _vae({"latent_channels": 16}, kl_weight=1e-6, lpips_weight=1.0, gan_weight=0.1, gan_start=20_000))


@recipe
def flextok_tiny() -> Recipe:
    """A FlexTok of 16 tokens on the pixels of 32 px images; about 15 seconds on two CPU cores."""
    return Recipe("tokenizer", _tiny(image_size=32, max_steps=40), _flextok("flextok-tiny", open_gates=True, noise_share=0.25))


@recipe
def flextok_emoji() -> Recipe:
    """64 tokens of 1,000 codes on the latents of emoji-vae; between one and two hours on a CPU core."""
    config = TrainConfig(
        out=Path(), data="emoji", image_size=64, max_steps=14_000, batch_size=32, learning_rate=1.5e-3, betas=(0.9, 0.95),
        weight_decay=0.02, warmup_steps=200, schedule="trapezoid", decay_fraction=0.4, final_fraction=0.02, ema_decay=0.999, save_every=500,
        preview_every=1000, log_every=50,
    )  # fmt: skip
    return Recipe("tokenizer", config, _flextok(FLEXTOK_EMOJI, "vistok/emoji-vae", **FLEXTOK_EMOJI_TASK))


@recipe
def flextok_imagenet256() -> Recipe:
    """The published d12-d12 (256 tokens, 64,000 codes) on the latents of a 16-channel VAE (--vae); weeks of one large GPU, so use eight.

    Schedule after the paper's appendix as far as it is public: pow2 nested dropout, mode time sampling 0.25, REPA on DINOv2-L, bf16.
    """
    config = TrainConfig(
        out=Path(), data="imagenet/train", image_size=256, max_steps=390_000, batch_size=1024, learning_rate=6e-4, betas=(0.9, 0.99),
        weight_decay=0.05, warmup_steps=5000, ema_decay=0.9999, precision="bf16", compile=True, workers=8, save_every=5000,
        preview_every=5000, process_timeout=600,
    )  # fmt: skip
    task = dict(null_dropout=0.2, repa="vit_large_patch14_dinov2.lvd142m", cached_views=0)
    return Recipe("tokenizer", config, _flextok("flextok-d12-d12", **task))


# -- generators -----------------------------------------------------------------------------------------------------------------------


@recipe
def gpt_tiny() -> Recipe:
    """A two-layer GPT over any tokenizer's tokens; seconds on two CPU cores."""
    shape = dict(width=64, depth=2, num_heads=2)
    return Recipe("generator", _tiny(image_size=32, max_steps=60), _gpt(shape), takes=GPT_TAKES)


@recipe
def gpt_emoji() -> Recipe:
    """Class and caption conditioned GPT, 4 layers of 160, 1.8 M parameters; about 4 minutes on two CPU cores for 64 tokens an image."""
    return Recipe("generator", _gpt_emoji_config(), _gpt(GPT_EMOJI, token_dropout=0.05), takes=GPT_TAKES)


@recipe
def gpt_emoji_16() -> Recipe:
    """gpt-emoji over the first 16 tokens of each image: what the bundled emoji-gpt is."""
    config = _gpt_emoji_config(max_steps=2000, batch_size=32)
    return Recipe("generator", config, _gpt(GPT_EMOJI, token_dropout=0.05), num_tokens=16, takes=GPT_TAKES)


# -- parts ----------------------------------------------------------------------------------------------------------------------------

VAE_EMOJI = dict(
    image_size=(64, 64), latent_channels=8, stem=4, block_channels=(48, 96), layers_per_block=2, norm_groups=16, mid_attention=False
)
FLEXTOK_EMOJI = dict(
    image_size=(64, 64), patch_size=(2, 2), max_grid=(4, 4), num_registers=64, levels=(8, 5, 5, 5), encoder_width=160, encoder_depth=3,
    decoder_width=160, decoder_depth=4, head_width=32, decoder_head_width=32, max_time=1.0, decode_steps=10, decode_guidance_scale=2.5,
)  # fmt: skip
FLEXTOK_EMOJI_TASK = dict(shared_length=True, noise_share=0.3, open_gates=True, cached_views=8)
GPT_TAKES = frozenset({"start", "grow"})
GPT_EMOJI = dict(width=160, depth=4, num_heads=5, hidden=448, text="hash", caption_buckets=1024)


def _tiny(**changes) -> TrainConfig:
    base = TrainConfig(
        out=Path(), data="emoji", batch_size=16, learning_rate=2e-3, betas=(0.9, 0.95), warmup_steps=10, ema_decay=0.95, save_every=20,
        preview_every=40, log_every=5,
    )  # fmt: skip
    return replace(base, **changes)


def _gpt_emoji_config(**changes) -> TrainConfig:
    base = TrainConfig(
        out=Path(), data="emoji", max_steps=1400, batch_size=16, learning_rate=2e-3, betas=(0.9, 0.95), weight_decay=0.05,
        warmup_steps=50, ema_decay=0.99, save_every=200, preview_every=400,
    )  # fmt: skip
    return replace(base, **changes)


def _square(image_size: int | None) -> dict:
    """The config field for square images; nothing where the recipe's size stays."""
    return {} if image_size is None else {"image_size": (image_size, image_size)}


VECTORS_A_CODE = 32  # in the data set: with fewer, k-means places codes on single vectors and held-out images leave them unused
MIN_CODES = 16


def _codebook_size(most: int, num_tokens: int, num_images: int | None) -> int:
    """`most` codes, halved until the data set's tokens are VECTORS_A_CODE a code."""
    size = most
    while num_images is not None and size > MIN_CODES and num_images * num_tokens < size * VECTORS_A_CODE:
        size //= 2
    return size


def _fsq2d(preset: str, **changes):
    def build(sources: Sources) -> TrainingTask:
        import vistok
        from vistok.training.tasks.tokenizer import TokenizerTask

        return TokenizerTask(vistok.create(preset, **{**changes, **_square(sources.image_size)}))

    return build


def _vae(shape: dict, **weights):
    def build(sources: Sources) -> TrainingTask:
        from vistok.tokenizers.vae import KLVAE, VAEConfig
        from vistok.training.tasks.vae import VAETask, VAETaskConfig

        return VAETask(KLVAE(VAEConfig(**{**shape, **_square(sources.image_size)})), VAETaskConfig(**weights))

    return build


def _resized(settings: Any, image_size: int | None) -> Any:
    """A FlexTokConfig for square images of this size, its position table large enough; unchanged for None."""
    if image_size is None:
        return settings
    grid = tuple(max(table, image_size // pixels) for table, pixels in zip(settings.max_grid, settings.reduction, strict=True))
    return replace(settings, max_grid=grid, **_square(image_size))


def _flextok(shape: str | dict, default_vae: str | None = None, **task):
    """shape: a preset's name or fields of FlexTokConfig; its VAE is replaced by the one in the sources, weights and all."""

    def build(sources: Sources) -> TrainingTask:
        import vistok
        from vistok.tokenizers.flextok import FlexTok, FlexTokConfig
        from vistok.tokenizers.vae import KLVAE
        from vistok.training.tasks.flextok import FlexTokTask, FlexTokTaskConfig

        source = sources.vae or default_vae
        vae = vistok.load(source) if source else None
        if vae is not None and not isinstance(vae, KLVAE):
            raise ValueError(f"{source} is a {type(vae).__name__}, not a KL-VAE")
        if isinstance(shape, dict):
            settings = FlexTokConfig(vae=vae.settings, **shape)
        else:
            with torch.device("meta"):
                settings = vistok.create(shape, **({"vae": vae.settings} if vae else {})).settings
        model = FlexTok(_resized(settings, sources.image_size))
        if model.vae is not None:
            if vae is None:
                raise ValueError("this recipe works on latents and needs a trained VAE: --vae NAME or FOLDER")
            model.vae.load_state_dict(vae.state_dict())
        return FlexTokTask(model, FlexTokTaskConfig(**task))

    return build


def _gpt(shape: dict, make_task: Callable[..., TrainingTask] | None = None, **task):
    """make_task: called with the model and the parts of a GeneratorTask; None: a plain one, configured by `task`."""

    def build(sources: Sources) -> TrainingTask:
        import vistok
        from vistok.generators import GPT, GPTConfig
        from vistok.registry import is_bundled
        from vistok.training.tasks.generator import GeneratorTask, GeneratorTaskConfig

        tokens = sources.tokens
        has_captions = any(tokens.captions)
        config = GPTConfig(
            codebook_size=tokens.codebook_size,
            layout_kind=tokens.layout.kind,
            layout_shape=tokens.layout.shape,
            max_tokens=tokens.plan.num_tokens,
            num_classes=len(tokens.classes),
            classes=tuple(tokens.classes),
            **{**shape, "text": shape.get("text", "none") if has_captions else "none"},
        )
        tokenizer = vistok.load(sources.tokenizer)
        reference = sources.tokenizer if is_bundled(sources.tokenizer) else None
        parts = dict(tokenizer=tokenizer, tokenizer_reference=reference, held_out=sources.held_out)
        model = GPT(config) if sources.start is None else _started(sources)
        if make_task is not None:
            return make_task(model, **parts)
        return GeneratorTask(model, GeneratorTaskConfig(**task), **parts)

    return build


def _started(sources: Sources) -> torch.nn.Module:
    """The GPT that a run starts from, grown where that is asked for. Whether it fits the tokens is the task's to check.

    Raises ValueError: it is no GPT, or cannot grow.
    """
    import vistok
    from vistok.generators import GPT

    model = vistok.load(sources.start)
    model = getattr(model, "generator", model)
    if not isinstance(model, GPT):
        raise ValueError(f"{sources.start} is a {type(model).__name__}, not a GPT")
    if sources.grow is not None:
        model.grow(sources.grow)
    return model.train()


# each file registers its recipes; they use what is above, so they come last
from vistok.training.recipes import drafter, gpt, lavit, orders, pruner, seed, teacher, titok, tokenflow, var, vision, vqgan, xar  # noqa: E402, F401
