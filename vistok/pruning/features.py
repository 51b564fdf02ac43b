"""The visual features of a batch, image by image, whatever shape a family keeps them in, and back into that shape when some have left.

Families give a list of [n, D], one tensor [I, n, D], or, in the Idefics line, the images of a prompt joined. LLaVA-NeXT and OneVision put a
learned newline after each row of patches: those are no patches, no method sees them, and all of them stay.
"""

import math
from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor, nn

from vistok.pruning.families import family_of, kind_of, newline_of, placeholder_id
from vistok.pruning.methods.topk import mask_of
from vistok.pruning.selectors import Selection, Selector


class VisualFeatures:
    """Features of every image and video of a batch, images first."""

    def __init__(self, model: nn.Module, outputs: dict, inputs: dict, projected: Tensor | None = None):
        self.model, self.outputs, self.inputs = model, outputs, inputs
        self._modality: list[str] = []
        self._rows: list[Tensor] = []
        for modality, output in outputs.items():
            images = _per_image(model, output, inputs["pixel_values_videos"] if modality == "video" else None)
            self._rows += images
            self._modality += [modality] * len(images)
        newline = newline_of(model)
        self._is_patch = [torch.ones(len(x), dtype=torch.bool, device=x.device) for x in self._rows]
        if newline is not None:
            self._is_patch = [(x != newline.to(x)).any(dim=-1) for x in self._rows]
        self.features: list[Tensor] = [x[is_patch] for x, is_patch in zip(self._rows, self._is_patch)]
        """[n, D] for each: what a method sees."""
        self._is_projected = projected is None
        if projected is not None:
            if [len(x) for x in projected] != self.num_patches:
                raise ValueError(f"the projector saw {tuple(projected.shape)}, which does not fit images of {self.num_patches} features")
            self.features = list(projected)

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each image in the prompt, newlines included."""
        return tuple(len(x) for x in self._rows)

    @property
    def num_patches(self) -> list[int]:
        """Tokens of each image that a method may drop."""
        return [int(x.sum()) for x in self._is_patch]

    @property
    def num_tokens(self) -> int:
        """Tokens of all images."""
        return sum(self.counts)

    def num_frames(self, image: int) -> int:
        """Frames of a video, 1 for an image."""
        if self._modality[image] == "image":
            return 1
        number = image - self._modality.count("image")
        grid = self.inputs.get("video_grid_thw")
        return int(grid[number, 0]) if grid is not None else self.inputs["pixel_values_videos"].shape[1]

    def grid(self, image: int) -> tuple[int, int] | None:
        """Rows and columns of an image (or frame), None where its tokens are not in raster order."""
        tower = family_of(self.model).tower
        if tower == "blocks":
            visual, modality = self.model.base_model.visual, self._modality[image]
            number = image - (0 if modality == "image" else self._modality.count("image"))
            _, height, width = self.inputs[f"{modality}_grid_thw"][number].tolist()
            return height // visual.spatial_merge_size, width // visual.spatial_merge_size
        side = math.isqrt(len(self.features[image]) // self.num_frames(image))
        return (side, side) if tower == "grid" and side * side * self.num_frames(image) == len(self.features[image]) else None

    def groups(self, *, one_by_one: bool) -> list[list[int]]:
        """Images that can be selected together: those of the same number of patches and frames in the same grid."""
        if one_by_one:
            return [[image] for image in range(len(self.features))]
        sizes: dict[tuple, list[int]] = {}
        for image, x in enumerate(self.features):
            sizes.setdefault((self._modality[image], len(x), self.num_frames(image), self.grid(image)), []).append(image)
        return list(sizes.values())

    def prompt_of_each(self, ids: Tensor, is_visual: Tensor) -> list[int]:
        """The row of `ids` that each image is in."""
        rows: list[int] = []
        for modality in self.outputs:
            row_of_token = (ids == placeholder_id(self.model, modality)).nonzero()[:, 0]
            lengths = [n for n, kind in zip(self.counts, self._modality) if kind == modality]
            starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
            rows += row_of_token[starts.to(row_of_token.device)].tolist()
        return rows

    def num_left(self, chosen: Sequence[Selection]) -> list[int]:
        """Tokens of each image that stay, newlines included."""
        return [len(x.indices) + int((~is_patch).sum()) for x, is_patch in zip(chosen, self._is_patch)]

    def kept_in_prompt_order(self, chosen: Sequence[Selection], ids: Tensor, is_visual: Tensor) -> Tensor:
        """[tokens of all images] bool in the order of the placeholders in `ids`."""
        stays = torch.zeros_like(ids, dtype=torch.bool)
        for modality in self.outputs:
            flags = [self._stays(image, x) for image, x in enumerate(chosen) if self._modality[image] == modality]
            stays[ids == placeholder_id(self.model, modality)] = torch.cat(flags)
        return stays[is_visual]

    def reduced(self, chosen: Sequence[Selection], projector: "merged_before_projector") -> dict:
        """The encoder outputs with what stays, in the family's own shape."""
        kept = []
        for image, (rows, selection) in enumerate(zip(self._rows, chosen)):
            stays = self._stays(image, selection)
            x = rows[stays]
            if selection.features is not None:
                merged = selection.features if self._is_projected else projector.project(selection.features)
                x = x.clone()
                x[self._is_patch[image][stays]] = merged.to(x)
            kept.append(x)
        outputs = {}
        for modality, output in self.outputs.items():
            images = [image for image, kind in enumerate(self._modality) if kind == modality]
            new = copy(output)
            new.pooler_output = _like(output.pooler_output, [kept[image] for image in images])
            if getattr(output, "deepstack_features", None) is not None:
                stays = [self._stays(image, chosen[image]) for image in images]
                new.deepstack_features = [_keep_layer(layer, stays) for layer in output.deepstack_features]
            outputs[modality] = new
        return outputs

    def _stays(self, image: int, selection: Selection) -> Tensor:
        is_patch = self._is_patch[image]
        stays = ~is_patch
        stays[is_patch] = mask_of(selection.indices[None], int(is_patch.sum()))[0]
        return stays


class merged_before_projector:  # noqa: N801  a context manager
    """Sees the projector's input while the images are encoded, for methods that merge patches in front of it.

    `projected` stays None where the projector mixes patches or the method does not merge; features are then merged behind it.
    """

    def __init__(self, model: nn.Module, selector: Selector):
        self.projected: Tensor | None = None
        self._projector = model.base_model.multi_modal_projector if selector.merges and family_of(model).is_pointwise else None

    def __enter__(self) -> "merged_before_projector":
        if self._projector is not None:
            self._hook = self._projector.register_forward_pre_hook(self._see)
        return self

    def __exit__(self, *error) -> None:
        if self._projector is not None:
            self._hook.remove()

    def project(self, x: Tensor) -> Tensor:
        """x: [K, D of the tower]. Returns [K, D of the language model]."""
        return self._projector(x[None])[0]

    def _see(self, projector: nn.Module, args: tuple) -> None:
        if self.projected is not None:
            raise ValueError("images and videos in one batch cannot be merged in front of the projector: prune them one after the other")
        self.projected = args[0]


def _per_image(model: nn.Module, output, videos: Tensor | None) -> list[Tensor]:
    """[n, D] for each image or video."""
    images = [x.reshape(-1, x.shape[-1]) for x in output.pooler_output]
    if kind_of(model).startswith(("idefics", "smolvlm")):
        num_images = output.last_hidden_state.shape[0]
    elif videos is not None and videos.ndim == 5:  # [videos, frames, 3, H, W]; Video-LLaVA gives its features frame by frame
        num_images = videos.shape[0]
    else:
        return images
    return list(torch.cat(images).split(sum(len(x) for x in images) // num_images))


def _like(pooled, images: list[Tensor]):
    """The kept features in the shape that the family's own were in."""
    if isinstance(pooled, Tensor):  # such models index the features as [images, n, D]; unequal counts go in as one long image
        return torch.stack(images) if len({len(x) for x in images}) == 1 else torch.cat(images)[None]
    if len(pooled) == len(images):
        return images
    joined, rest = [], list(images)
    size = sum(len(x) for x in pooled) // len(images)
    for prompt in pooled:
        count = len(prompt) // size
        joined.append(torch.cat(rest[:count]) if count else prompt)
        rest = rest[count:]
    return joined


def _keep_layer(layer, stays: list[Tensor]):
    """One layer of Qwen3's deepstack features: a list for each image, or all images in a row."""
    if isinstance(layer, Tensor):
        return layer[torch.cat(stays)]
    return [x[keep] for x, keep in zip(layer, stays)]
