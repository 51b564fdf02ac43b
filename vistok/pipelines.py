"""TokenImagePipeline: class names or captions to pictures, through a generator and a tokenizer.

    pipe = TokenImagePipeline.from_pretrained("vistok/emoji-gpt")
    pipe(labels=["Animals & Nature"], num_images=4).images

Its folder holds `model_index.json` and one entry a component, each either
* ["vistok", "GPT"]: a registered class; its folder is `generator/` or `tokenizer/` beside the index, or
* "vistok/emoji-flextok", "owner/name" or "../emoji-flextok": a reference to a bundled model, a hub id, or a folder relative to the index
  (starting with ./ or ../), so that two pipelines can share one tokenizer's weights.
Nothing in it names code: a class is looked up in vistok's registry, never imported.
"""

import difflib
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers import __version__ as diffusers_version
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from vistok import rng
from vistok.decoding import GenerationStats, SamplingConfig, generate_exits, step_sizes
from vistok.decoding.drafters.choose import choose_drafter, choose_rule
from vistok.decoding.flow import check_values, makes_values
from vistok.decoding.rows import generate_rows
from vistok.decoding.serving import partial_tokens, plain_draw
from vistok.decoding.speculative import check_target, speculate
from vistok.generators import TextEncoder
from vistok.image import to_pil
from vistok.modeling import MAX_CONFIG_BYTES, VisualModel, read_config, read_json
from vistok.registry import model_class, resolve
from vistok.tokens import VisualTokens

INDEX_NAME = "model_index.json"
COMPONENTS = ("generator", "tokenizer")
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")


@dataclass
class TokenImageOutput(BaseOutput):
    """What a call made.

    images: as `output_type` asked. tokens: of all images, on the CPU. stats: of the token loop, and decode_seconds.
    seed: makes the same images again (None when generators were given).
    """

    images: list[Image.Image] | Tensor | np.ndarray
    tokens: VisualTokens
    stats: GenerationStats
    seed: int | None


class TokenImagePipeline(DiffusionPipeline):
    """Labels or captions -> tokens -> images.

    generator: predicts ids, or values (xAR), which are snapped to the codes of a tokenizer that has any. tokenizer: decodes them.
    Raises ValueError: they do not speak the same codebook.
    """

    config_name = INDEX_NAME
    model_cpu_offload_seq = "generator->tokenizer"

    def __init__(self, generator, tokenizer):
        super().__init__()
        if makes_values(generator):
            check_values(generator, tokenizer)
        elif generator.vocab_size != tokenizer.codebook_size:
            raise ValueError(
                f"the generator predicts {generator.vocab_size} codes but the tokenizer has {tokenizer.codebook_size}: "
                "they were not trained together"
            )
        if generator.max_tokens > tokenizer.max_tokens:
            raise ValueError(f"the generator makes {generator.max_tokens} tokens but the tokenizer decodes at most {tokenizer.max_tokens}")
        self.register_modules(generator=generator, tokenizer=tokenizer)
        self._text_encoder: TextEncoder | None = None

    @property
    def _settings(self):
        return self.generator.settings

    @property
    def classes(self) -> tuple[str, ...]:
        """Names that `labels` may hold."""
        return self._settings.classes

    @torch.no_grad()
    def __call__(
        self,
        *,
        labels: Sequence[str | int] | None = None,
        prompts: Sequence[str] | None = None,
        num_images: int = 1,
        num_tokens: int | None = None,
        guidance_scale: float | Callable[[int], float] = 1.5,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        typical_p: float = 1.0,
        row_window: int | None = None,
        row_window_adapts: bool = False,
        exits: int | None = None,
        num_steps: int | None = None,
        final_steps: int | None = None,
        solver: str | None = None,
        prefix: Tensor | None = None,
        drafter=None,
        rule=None,
        eps: float | None = None,
        num_draft_tokens: int | Literal["auto"] | None = None,
        seed: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
        batch_size: int = 32,
        decode_options: dict[str, Any] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[["TokenImagePipeline", int, Tensor], None] | None = None,
    ) -> TokenImageOutput:
        """Make images.

        labels: class names or numbers. prompts: captions. With both, the i-th of each belong together; with neither, unconditional.
        num_images: for each label or prompt; images of one come one after the other.
        num_tokens: tokens an image; a tokenizer of ordered tokens (FlexTok) decodes any number, one of scales (VAR) whole scales, a grid
        needs all, the default.
        guidance_scale: 1 is off; or a function of the step; VAR rises to it from scale to scale, xAR from entity to entity.
        temperature, top_k, top_p, min_p, typical_p: of a generator of ids, see `SamplingConfig`.
        row_window: on a grid, start a row of tokens when the row above has so many: fewer passes, other images (`decoding.generate_rows`).
        row_window_adapts: a row also waits until its first token stays the same while the row above grows.
        exits: later tokens run ever fewer layers, the last one the first and so many of the last (`decoding.generate_exits`): other images.
        num_steps, final_steps, solver: of xAR, see `FlowSampling`; what is not given is as there. num_steps is also the passes of a
        MaskGIT, and those over each scale of TokenFlow's generator.
        prefix: of each image's first tokens, as the callback got them, from which the same seed goes on: ids [n, tokens], or xAR's values
        [n, slots, C]. Not with a drafter.
        drafter: speculative decoding by a drafter: its name (`decoding.drafters.list_drafters()`), a drafter (`make_drafter`), or a trained
        head or smaller generator, or where to load one from. rule: which drafts are kept: a rule or its name
        (`decoding.accept.list_rules()`); by default "standard", which leaves the law of the images as it is, and "lantern_budget" where eps
        is given. eps: total variation that the law of a token may lose. num_draft_tokens: see `decoding.speculate`.
        seed: of image i's own generator, with i; drawn and returned when there are no generators. generators: one an image, instead.
        batch_size: images in memory at once; the result does not depend on it.
        decode_options: for `tokenizer.decode`, such as a flow decoder's num_steps and guidance_scale.
        output_type: "pil", or values in [0, 1] as "pt" [n, 3, H, W] or "np" [n, H, W, 3].
        callback_on_step_end: called with (pipeline, step, ids so far) after each step, a token or a scale, of each batch; xAR's with
        (pipeline, entity, values of all slots so far). `partial_images` shows them.
        Raises ValueError: an unknown label (the nearest class is named), a condition that the generator cannot read, a wrong number.
        """
        if output_type not in ("pil", "pt", "np"):
            raise ValueError(f"output_type={output_type!r} but it is one of pil, pt, np")
        for name, value in (("num_images", num_images), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        numbers, texts = self._conditions(labels, prompts)
        conditions = len(numbers or texts or [None])
        numbers = None if numbers is None else [n for n in numbers for _ in range(num_images)]
        texts = None if texts is None else [text for text in texts for _ in range(num_images)]
        total = conditions * num_images
        generators, seed = self._generators(generators, seed, total)
        choice = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p)
        sampling = SamplingConfig(**choice)
        if row_window_adapts and row_window is None:
            raise ValueError("row_window_adapts needs a row_window, the least that a row waits for")
        if row_window is not None:
            if any(given is not None for given in (drafter, prefix, num_tokens, exits)):
                raise ValueError("row_window is for all tokens of a grid, without a drafter, a prefix or exits")
            draw = self._in_rows(sampling, row_window, row_window_adapts)
        elif exits is not None:
            if drafter is not None or prefix is not None:
                raise ValueError("exits are for plain decoding, without a drafter or a prefix")
            draw = self._with_exits(sampling, exits)
        elif drafter is not None:
            if prefix is not None:
                raise ValueError("a prefix is for plain decoding; leave the drafter out")
            draw = self._drafted(sampling, drafter, rule, eps, num_draft_tokens)
        elif any(given is not None for given in (rule, eps, num_draft_tokens)):
            raise ValueError("rule, eps and num_draft_tokens say what becomes of drafts; give a drafter too, such as 'jacobi'")
        else:
            how = dict(num_steps=num_steps, final_steps=final_steps, solver=solver)
            draw = plain_draw(self.generator, self.tokenizer, sampling, how, prefix, total)
        low, high = self.tokenizer.min_tokens, self.generator.max_tokens
        steps = high if num_tokens is None else num_tokens
        if isinstance(steps, bool) or not isinstance(steps, int) or not low <= steps <= high:
            raise ValueError(
                f"num_tokens={num_tokens!r} but this pipeline makes images of " + (f"{low} to {high} tokens" if low < high else f"{high}")
            )

        parts, pictures, costs = [], [], []
        with self.progress_bar(total=len(step_sizes(self.generator, steps)) * -(-total // batch_size)) as bar:

            def on_step(step: int, ids: Tensor) -> None:
                bar.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(self, step, ids)

            for start in range(0, total, batch_size):
                rows = slice(start, start + batch_size)
                tokens, cost = draw(
                    rows,
                    self._condition(numbers and numbers[rows], texts and texts[rows], len(generators[rows])),
                    generators=generators[rows],
                    num_tokens=num_tokens,
                    guidance_scale=guidance_scale if numbers or texts else 1.0,
                    on_step=on_step,
                )
                began = time.perf_counter()
                images = self.tokenizer.decode(tokens.to(self.tokenizer.device), generators=generators[rows], **(decode_options or {}))
                pictures.append(images.float().cpu())
                costs.append(replace(cost, decode_seconds=time.perf_counter() - began))
                parts.append(tokens.to("cpu"))
        return TokenImageOutput(_as_output(torch.cat(pictures), output_type), VisualTokens.stack(parts), reduce(add, costs), seed)

    def _drafted(self, sampling: SamplingConfig, drafter, rule, eps: float | None, num_draft_tokens) -> Callable:
        """What draws the tokens of a batch with drafts; the drafter is the same for all batches, so that what it learns stays."""
        check_target(self.generator)
        drafter = choose_drafter(drafter, self.generator)
        rule = choose_rule(rule, tokenizer=self.tokenizer, target=self.generator, eps=eps)
        fixed = dict(sampling=sampling, drafter=drafter, rule=rule, num_draft_tokens=num_draft_tokens)
        return lambda rows, condition, **options: speculate(self.generator, condition, **fixed, **options)

    def _in_rows(self, sampling: SamplingConfig, window: int, window_adapts: bool) -> Callable:
        """What draws the tokens of a batch in rows that overlap."""
        fixed = dict(sampling=sampling, window=window, window_adapts=window_adapts)
        return lambda rows, condition, *, num_tokens, **options: generate_rows(self.generator, condition, **fixed, **options)

    def _with_exits(self, sampling: SamplingConfig, least: int) -> Callable:
        """What draws the tokens of a batch by ever fewer layers."""
        return lambda rows, condition, **options: generate_exits(self.generator, condition, sampling=sampling, least=least, **options)

    @torch.no_grad()
    def partial_images(self, data: Tensor, *, output_type: str = "pil"):
        """What the tokens that `callback_on_step_end` was given show: ids [B, n], or xAR's values [B, n, C]; see `partial_tokens`.

        output_type: as in a call. Raises ValueError: the values end inside an entity.
        """
        tokenizer = self.tokenizer
        tokens = partial_tokens(self.generator, tokenizer, data)
        generators = rng.image_generators(0, len(data))
        return _as_output(tokenizer.decode(tokens.to(tokenizer.device), generators=generators).float().cpu(), output_type)

    def _conditions(self, labels, prompts) -> tuple[list[int] | None, list[str] | None]:
        for name, value in (("labels", labels), ("prompts", prompts)):
            if isinstance(value, (str, int)):
                raise ValueError(f"{name} must be a list, got {value!r}; write {name}=[{value!r}]")
            if value is not None and len(value) == 0:
                raise ValueError(f"{name} is empty; leave it out to generate without")
        if labels is not None and prompts is not None and len(labels) != len(prompts):
            raise ValueError(f"{len(labels)} labels and {len(prompts)} prompts: give as many of both, or one kind only")
        if prompts is not None and self._settings.text == "none":
            raise ValueError("this generator reads no captions; " + ("use labels" if self._settings.num_classes else "it is unconditional"))
        for prompt in prompts or ():
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"a prompt must be a text with words in it, got {prompt!r}")
        return None if labels is None else [self.class_number(label) for label in labels], None if prompts is None else list(prompts)

    def class_number(self, label: str | int) -> int:
        """Number of a class given by name or number. Raises ValueError: there is no such class; the nearest is named."""
        count, names = self._settings.num_classes, self.classes
        if not count:
            raise ValueError(
                "this generator has no classes; " + ("use prompts" if self._settings.text != "none" else "it is unconditional")
            )
        if isinstance(label, str):
            if label in names:
                return names.index(label)
            folded = [name.casefold() for name in names]
            if folded.count(label.casefold()) == 1:
                return folded.index(label.casefold())
            near = difflib.get_close_matches(label.casefold(), folded, 1, cutoff=0.4)
            hint = f"; did you mean {names[folded.index(near[0])]!r}?" if near else ""
            listed = f"classes: {', '.join(names[:20])}{', ...' if count > 20 else ''}" if names else f"its classes are 0 to {count - 1}"
            raise ValueError(f"there is no class {label!r}{hint}; {listed}")
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < count:
            raise ValueError(f"label {label!r} is no class; classes are 0 to {count - 1}")
        return label

    def _generators(self, generators, seed: int | None, total: int) -> tuple[list[torch.Generator], int | None]:
        if generators is not None:
            if seed is not None:
                raise ValueError("give seed or generators, not both")
            if isinstance(generators, torch.Generator) or len(generators) != total:
                count = 1 if isinstance(generators, torch.Generator) else len(generators)
                raise ValueError(f"generators must be a list of {total}, one an image, got {count}; see vistok.image_generators")
            return list(generators), None
        seed = random.SystemRandom().getrandbits(31) if seed is None else seed
        return rng.image_generators(seed, total), seed

    def _condition(self, labels: list[int] | None, captions: list[str] | None, batch_size: int):
        settings, features = self._settings, None
        if captions is not None and settings.text != "hash":
            if self._text_encoder is None:
                self._text_encoder = TextEncoder(settings.text, settings.caption_tokens)
            features = self._text_encoder(captions)
        return self.generator.make_condition(batch_size, labels=labels, captions=captions, features=features)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        dtype: torch.dtype | None = None,
        tokenizer_reference: str | None = None,
        safe_serialization: bool = True,
        **options,
    ) -> None:
        """Write model_index.json and the components; the index last, so a folder with one is complete.

        dtype: of the weights on disk, as in `VisualModel.save_pretrained`.
        tokenizer_reference: write this name instead of the tokenizer (see the file's head); it must lead to the same tokenizer.
        """
        if not safe_serialization or any(options.get(key) for key in ("variant", "push_to_hub", "use_flashpack")):
            raise ValueError("vistok writes plain safetensors folders; use pipe.push_to_hub(...) to publish one")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        index: dict[str, Any] = {"_class_name": type(self).__name__, "_diffusers_version": diffusers_version}
        for name in COMPONENTS:
            model = getattr(self, name)
            if name == "tokenizer" and tokenizer_reference is not None:
                index[name] = tokenizer_reference
                continue
            model.save_pretrained(folder / name, dtype=dtype)
            index[name] = ["vistok", type(model).__name__]
        temporary = folder / f".tmp-{os.getpid()}-{INDEX_NAME}"
        temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, folder / INDEX_NAME)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, *, torch_dtype: torch.dtype | None = None, generator=None, tokenizer=None, **options
    ) -> "TokenImagePipeline":
        """Load a folder, a run folder, a bundled name (`vistok/emoji-gpt`) or a hub id.

        torch_dtype: of the weights in memory, float32 by default. generator, tokenizer: models to use instead of the folder's.
        options: revision, token, cache_dir and local_files_only, for the hub.
        Raises OSError: nothing there. ValueError: the index or a component does not fit.
        """
        torch_dtype = options.pop("dtype", None) or torch_dtype
        unknown = sorted(set(options) - set(_HUB_OPTIONS))
        if unknown:
            raise TypeError(f"{cls.__name__}.from_pretrained has no option {unknown[0]!r}")
        folder = resolve(source, **options)
        index = _read_index(folder)
        given = {"generator": generator, "tokenizer": tokenizer}
        models = {
            name: given[name] if given[name] is not None else _load_component(folder, name, index[name], torch_dtype, options)
            for name in COMPONENTS
        }
        return cls(**models)


def _read_index(folder: Path) -> dict[str, Any]:
    """model_index.json as plain data, checked. Raises OSError: there is none. ValueError: it is not one of ours."""
    path = folder / INDEX_NAME
    if not path.is_file():
        raise OSError(f"{folder} is no pipeline folder: it has no {INDEX_NAME}")
    index = read_json(path, max_bytes=MAX_CONFIG_BYTES)
    if index.get("_class_name") != TokenImagePipeline.__name__:
        raise ValueError(f"{path} does not describe a {TokenImagePipeline.__name__}")
    expected = {"_class_name", "_diffusers_version", "_name_or_path", *COMPONENTS}
    wrong = sorted((set(index) - expected) | (set(COMPONENTS) - set(index)))
    if wrong:
        raise ValueError(f"{path}: unknown or missing entry {wrong[0]!r}; a pipeline has {' and '.join(COMPONENTS)}")
    return index


def _load_component(folder: Path, name: str, entry: Any, dtype: torch.dtype | None, hub: dict[str, Any]) -> VisualModel:
    """The model of one entry of the index: beside it, or behind a reference."""
    if isinstance(entry, str):
        hub = {key: value for key, value in hub.items() if key != "revision"}  # a revision is of the pipeline's own repository
        place = resolve(folder / entry if entry.startswith(("./", "../")) else entry, **hub)
        class_name = read_config(place).get("_class_name")
    elif isinstance(entry, list) and len(entry) == 2 and entry[0] == "vistok":
        place, class_name = folder / name, entry[1]
    else:
        raise ValueError(f'{folder / INDEX_NAME}: {name} must be ["vistok", "ClassName"] or a reference, got {entry!r}')
    if not isinstance(class_name, str):
        raise ValueError(f"{place} does not say which model it holds (_class_name)")
    return model_class(class_name).from_pretrained(place, torch_dtype=dtype)


def _as_output(images: Tensor, output_type: str):
    """images [n, 3, H, W] in [-1, 1] as pictures, or as values in [0, 1]."""
    if output_type == "pil":
        return to_pil(images)
    images = (images / 2 + 0.5).clamp(0, 1)
    return images if output_type == "pt" else images.permute(0, 2, 3, 1).numpy()
