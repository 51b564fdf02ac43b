"""`vistok prune`: images with the tokens a method keeps, folds and drops, layer by layer."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from vistok.commands.common import Device, Model, Threads, optional, shown, use_device
from vistok.commands.reconstruct import expand

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Show what token reduction does to images: one row an image, one column a layer.

    Patches folded into one token share a tint, dropped ones are pale. Prints tokens, multiply-adds and the model's answer with and without.
    The model is a vision transformer (timm or transformers), or a vision-language model with a square grid of tokens: it answers --prompt.

        vistok prune cat.jpg --out overlay.png                                                  ToMe on the bundled emoji-vit
        vistok prune PHOTOS --method pitome --keep-ratio 0.3 --layers 4 8 12 --out overlay.png
        vistok prune scene.png --model vistok/emoji-vlm --method fastv --prompt "what is at b3 ?" --out overlay.png
    """

    images: tyro.conf.Positional[shown(tuple[str, ...], "IMAGE...", "one or more")]
    """Image files, or folders of them."""
    model: Model = "vistok/emoji-vit"
    """A bundled name, a run folder of `vistok train classifier`, a folder of timm or transformers, or a hub id."""
    method: str = "tome"
    """tome, pitome, zero_tprune, random, uniform or cls; for a vision-language model divprune, cls, hiprune, fastv, pyramiddrop ..."""
    keep_ratio: optional(float, "SHARE", "default: 0.5, or the method's own") = None
    """Share of the patches that are left at the end."""
    layers: shown(tuple[int, ...], "L...", "default: five of them") = ()
    """Layers to show, counted from 1: what is left after them."""
    prompt: str = "read the word ?"
    """What a vision-language model is asked."""
    out: shown(Path, "FILE") = Path("overlay.png")
    """Picture to write."""
    device: Device = None
    """Where the model runs: cpu, cuda, cuda:1, mps."""
    threads: Threads = None
    """CPU threads of torch."""

    def run(self) -> None:
        import torch

        import vistok
        from vistok.image import make_strip

        if not self.images:
            raise ValueError("give at least one image: vistok prune IMAGE")
        files = expand(self.images)
        model = vistok.load(self.model).to(use_device(self.device, self.threads))
        with torch.inference_mode():
            rows, titles, facts = self._language(model, files) if hasattr(model, "processor") else self._vision(model, files)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        make_strip(rows, column_titles=titles, row_titles=[Path(file).name[:24] for file in files]).save(self.out)
        print("\n".join(facts))
        print(self.out)

    def _vision(self, model, files: list[str]):
        import vistok
        from vistok.pruning.blocks import parts_of
        from vistok.pruning.overlay import overlay

        if self.keep_ratio is not None and self.method == "zero_tprune":
            raise ValueError("zero_tprune has its published rates: leave --keep-ratio out")
        options = {} if self.method == "zero_tprune" else {"keep_ratio": 0.5 if self.keep_ratio is None else self.keep_ratio}
        prefix, depth = parts_of(model).num_prefix, len(parts_of(model).blocks)
        chosen = self._chosen(depth)
        size, mean, std = _pixels(model)
        rows, facts = [], []
        for file in files:
            image = _open(file, size).to(next(model.parameters()).device)
            x = ((image + 1) / 2 - mean.to(image)) / std.to(image)
            before = model(x)
            with vistok.prune(model, self.method, **options) as pruned:
                after = model(x)
            stats = pruned.stats()
            plans = [pruned.plan_of(layer) for layer in chosen]
            side = round((stats.num_tokens[0] - prefix) ** 0.5)
            rows.append([overlay(image[0], plan.owner[0, prefix:], (side, side)) for plan in plans])
            facts.append(f"{file}: {stats.num_tokens[0]} -> {stats.num_tokens[-1]} tokens, {stats.macs_ratio:.0%} of the multiply-adds")
            facts[-1] += _answers(model, before, after)
        return rows, [f"layer {layer}: {stats.num_tokens[layer]} tokens" for layer in chosen], facts

    def _language(self, model, files: list[str]):
        import torch

        import vistok
        from vistok.image import open_image, to_tensor
        from vistok.pruning.families import visual_mask
        from vistok.pruning.overlay import overlay
        from vistok.pruning.stages import INSIDE_ONLY

        options = {} if self.keep_ratio is None and self.method in INSIDE_ONLY else {"keep_ratio": self.keep_ratio or 0.5}
        if self.method == "fastv" and self.keep_ratio is None:
            options = {"layer": 2, "keep_ratio": 0.5}
        processor = model.processor
        message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.prompt}]}]
        text = processor.apply_chat_template(message, add_generation_prompt=True)
        rows, facts = [], []
        for file in files:
            picture = open_image(file)
            inputs = processor(images=picture, text=text, return_tensors="pt").to(model.device)
            length = inputs["input_ids"].shape[1]
            said = []
            for handle in (None, vistok.prune(model, self.method, **options)):
                out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
                said.append(processor.decode(out[0, length:], skip_special_tokens=True).strip())
                if handle is not None:
                    drops = handle.drops()
                    handle.remove()
            visual = visual_mask(model, inputs["input_ids"])[0]
            side = round(int(visual.sum()) ** 0.5)
            if side**2 != int(visual.sum()):
                raise ValueError(
                    f"{int(visual.sum())} visual tokens are no square grid: the picture of this model's tokens cannot be drawn"
                )
            square = to_tensor(picture.resize((side * 16, side * 16)))
            square = square if square.ndim == 3 else square[0]
            index = torch.arange(side**2, device=visual.device)
            masks = [gone[0][visual] for _, gone in drops]
            masks = [torch.stack(masks[: stage + 1]).any(dim=0) for stage in range(len(masks))]  # what is gone stays gone
            rows.append([overlay(square, torch.where(gone, -1, index), (side, side)) for gone in masks])
            titles = [f"from layer {layer} on: {int((~gone).sum())} of {side**2}" for (layer, _), gone in zip(drops, masks)]
            facts.append(f"{file}: {self.prompt} {said[0]!r}, pruned {said[1]!r}")
        return rows, titles, facts

    def _chosen(self, depth: int) -> list[int]:
        if any(not 1 <= layer <= depth for layer in self.layers):
            raise ValueError(f"layers={self.layers} but the model has layers 1 to {depth}")
        return list(self.layers) or sorted({max(1, round(depth * part / 5)) for part in range(1, 6)})


def _answers(model, before, after) -> str:
    """The classes a classifier names, or how far the features of a tower moved."""
    names = getattr(model, "label_names", None)
    if names:
        first, second = (names[int(logits.argmax())] for logits in (before, after))
        return f"; {first}" + ("" if first == second else f", reduced {second}")
    return ""


def _pixels(model) -> "tuple[tuple[int, int], Tensor, Tensor]":
    """Size of a model's images and how it normalises them, [1, 3, 1, 1] each."""
    import torch

    config = getattr(model, "pretrained_cfg", None) or {}
    if hasattr(model, "patch_embed"):
        size = tuple(model.patch_embed.img_size)
    else:
        side = getattr(model.config, "image_size", None) or model.config.vision_config.image_size
        size = (side, side) if isinstance(side, int) else tuple(side)
    mean, std = (torch.tensor(config.get(name) or [0.5] * 3).view(1, 3, 1, 1) for name in ("mean", "std"))
    return size, mean, std


def _open(file: str, size: tuple[int, int]) -> "Tensor":
    """One image [1, 3, H, W] in [-1, 1]."""
    from vistok.image import load_images

    return load_images([file], size)
