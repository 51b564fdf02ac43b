"""What a vision tower attended to, feature by feature, read while the model encodes its images.

Taps on the wanted layers keep queries, keys and values; rows of attention are computed from them afterwards, beside the kernel that ran. A
tower sees patches, the language model sees features; `index` says which patches are in each feature, and a feature's view is the sum (of
attention) or the mean (of keys, values) over them.

    class token      row       softmax(q_CLS k^T)                      mean over heads
    no class token   received  mean over queries of softmax(q k^T)     in chunks of query rows, so the full map is never held

I images, n features of an image, s patches of a feature, P patches of all images in the order the tower saw them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vistok.pruning.families import attention_of, family_of, kind_of, vision_layers
from vistok.pruning.tap import AttentionCall, Tap

_CHUNK_CELLS = 1 << 22


class TowerTap:
    """Reads the given layers of a model's vision tower while it is entered."""

    def __init__(self, model: nn.Module, layers: Sequence[int]):
        if not family_of(model).tower:
            raise ValueError(
                f"how patches of {kind_of(model)}'s tower become features is not mapped, so methods that read its attention cannot run; "
                "take one that reads features: divprune, cdpruner, dart, random, uniform"
            )
        self.model, self.layers = model, tuple(layers)
        self._calls: dict[int, list[AttentionCall]] = {layer: [] for layer in self.layers}

    def __enter__(self) -> "TowerTap":
        attentions = [attention_of(layer) for layer in vision_layers(self.model)]
        self._taps = [Tap(attentions[layer], self._calls[layer].append) for layer in self._calls]
        return self

    def __exit__(self, *error) -> None:
        for tap in self._taps:
            tap.remove()

    def views(self, num_features: Sequence[int], inputs: dict) -> "TowerViews":
        """The views of the images just encoded. num_features: of each image, newlines left out. inputs: what the model was given."""
        calls = self._calls[self.layers[0]]
        if not calls:
            raise RuntimeError("the vision tower's attention did not run")
        shapes = [(call.query.shape[0], call.query.shape[2]) for call in calls]
        index, num_prefix = _INDEX[family_of(self.model).tower](self.model, num_features, shapes, inputs)
        return TowerViews(self._calls, index, num_prefix)


class TowerViews:
    """Views of every image by layer; each is computed when it is asked for, for the images asked for."""

    def __init__(self, calls: dict[int, list[AttentionCall]], index: list[Tensor], num_prefix: int):
        self._calls, self._index, self.num_prefix = calls, index, num_prefix
        self._flat: dict[tuple[str, int], Tensor] = {}

    @property
    def has_class_token(self) -> bool:
        """Whether the first token of the tower is a class token."""
        return self.num_prefix > 0

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that were read."""
        return tuple(self._calls)

    def attention(self, layer: int, images: Sequence[int]) -> Tensor:
        """[I, n] float32: the class token's attention to each feature, or what each receives where there is no class token."""
        return self._gather("attention" if self.has_class_token else "received", layer, images).sum(dim=2)[..., 0]

    def received(self, layer: int, images: Sequence[int]) -> Tensor:
        """[I, n] float32: the mean attention that each feature's patches receive."""
        return self._gather("received", layer, images).sum(dim=2)[..., 0]

    def joint_attention(self, layer: int, images: Sequence[int]) -> Tensor:
        """[I, n] float32: the class token's attention with all heads side by side as one (PruMerge); received without a class token."""
        return self._gather("joint", layer, images).sum(dim=2)[..., 0]

    def key(self, layer: int, images: Sequence[int]) -> Tensor:
        """[I, n, d]: keys, mean over heads and over a feature's patches."""
        return self._gather("key", layer, images).mean(dim=2)

    def joint_key(self, layer: int, images: Sequence[int]) -> Tensor:
        """[I, n, H d]: keys with the heads side by side, mean over a feature's patches."""
        return self._gather("joint_key", layer, images).mean(dim=2)

    def value(self, layer: int, images: Sequence[int]) -> Tensor:
        """[I, n, H d]: values with the heads side by side, mean over a feature's patches."""
        return self._gather("value", layer, images).mean(dim=2)

    def similarity(self, layer: int, images: Sequence[int]) -> Tensor:
        """[I, n]: cosine of each feature's values to the class token's, or to their mean without one, cut off at 0."""
        return self._gather("similarity", layer, images).mean(dim=2)[..., 0]

    def _gather(self, name: str, layer: int, images: Sequence[int]) -> Tensor:
        """[I, n, s, C]: the patches' numbers, put in the places of the features."""
        if (name, layer) not in self._flat:
            make = getattr(self, f"_{name}")
            self._flat[name, layer] = torch.cat([make(call).flatten(0, 1) for call in self._calls[layer]])
        return self._flat[name, layer][torch.stack([self._index[image] for image in images])]

    # What a call says of its patches: [tower rows, tokens, C].

    def _attention(self, call: AttentionCall) -> Tensor:
        return _probabilities(call.query[:, :, :1], call).mean(dim=(1, 2))[..., None]

    def _received(self, call: AttentionCall) -> Tensor:
        return _received(call)

    def _joint(self, call: AttentionCall) -> Tensor:
        query, key = (x.transpose(1, 2).flatten(2)[:, None] for x in (call.query, call.key))
        joint = AttentionCall(call.module, query, key, call.value, call.mask, query.shape[-1] ** -0.5, {})
        if self.has_class_token:
            return _probabilities(query[:, :, :1], joint).mean(dim=(1, 2))[..., None]
        return _received(joint)

    def _key(self, call: AttentionCall) -> Tensor:
        return call.key.mean(dim=1)

    def _joint_key(self, call: AttentionCall) -> Tensor:
        return call.key.transpose(1, 2).flatten(2)

    def _value(self, call: AttentionCall) -> Tensor:
        return call.value.transpose(1, 2).flatten(2)

    def _similarity(self, call: AttentionCall) -> Tensor:
        value = self._value(call).float()
        centre = value[:, :1] if self.has_class_token else value.mean(dim=1, keepdim=True)
        return torch.cosine_similarity(value, centre, dim=-1).clamp(min=0)[..., None]


def _probabilities(query: Tensor, call: AttentionCall, rows: slice = slice(0, 1)) -> Tensor:
    """query: [B, H, R, d], the given rows of the call's. Returns [B, H, R, N] float32."""
    logits = query.float() @ call.key.float().transpose(-2, -1) * call.scale
    if isinstance(call.mask, Tensor):
        mask = call.mask[:, :, rows]
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.float()
    return logits.softmax(dim=-1)


def _received(call: AttentionCall) -> Tensor:
    """Mean attention each key receives, over heads and queries: [B, N, 1]. A few query rows at a time, so no N x N map is held."""
    B, H, N, _ = call.query.shape
    rows = max(1, _CHUNK_CELLS // (B * H * N))
    total = torch.zeros(B, N, device=call.query.device)
    for start in range(0, N, rows):
        chunk = slice(start, start + rows)
        total += _probabilities(call.query[:, :, chunk], call, chunk).sum(dim=2).mean(dim=1)
    return (total / N)[..., None]


# Which patches make up a feature. Each returns ([n, s] indices into the P patches for every image, tokens before the first patch).


def _grid_index(model: nn.Module, num_features: Sequence[int], shapes: list[tuple[int, int]], inputs: dict) -> tuple[list[Tensor], int]:
    """Square images in raster order, one row of the tower each; a feature is a square of patches (pixel shuffle, pooling) or one patch."""
    rows, length = shapes[0]
    if len(shapes) > 1 or rows != len(num_features) or len(set(num_features)) > 1:
        raise ValueError(f"the tower saw {shapes} (images, tokens), which does not fit images of {list(num_features)} features")
    n = num_features[0]
    for num_prefix in (0, 1):
        side, width = int((length - num_prefix) ** 0.5), int(n**0.5)
        if side * side == length - num_prefix and width * width == n and side % width == 0:
            break
    else:
        raise ValueError(f"{length} tokens of the tower are no grid that {n} features divide")
    s = side // width
    patches = torch.arange(side * side).view(width, s, width, s).transpose(1, 2).reshape(n, s * s) + num_prefix
    return [patches + row * length for row in range(rows)], num_prefix


def _tiles_index(model: nn.Module, num_features: Sequence[int], shapes: list[tuple[int, int]], inputs: dict) -> tuple[list[Tensor], int]:
    """LLaVA-NeXT: the numbers of the patches go through the model's own unpadding, which says where each one ends up."""
    rows, length = shapes[0]
    strategy = model.config.vision_feature_select_strategy
    num_prefix = 1 if strategy == "default" else 0
    numbers = torch.arange(rows * length, dtype=torch.float64).view(rows, length, 1)[:, num_prefix:]
    newline = torch.full((1,), -1.0, dtype=torch.float64)
    tiles = _tile_counts(model, inputs["image_sizes"])
    packed, _ = model.base_model.pack_image_features(numbers.split(tiles), inputs["image_sizes"], strategy, newline)
    return [x[x[:, 0] >= 0].round().long() for x in packed], num_prefix  # a newline, -1, is no patch


def _tile_counts(model: nn.Module, image_sizes: Tensor) -> list[int]:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = model.config
    return [image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size) for size in image_sizes]


def _blocks_index(model: nn.Module, num_features: Sequence[int], shapes: list[tuple[int, int]], inputs: dict) -> tuple[list[Tensor], int]:
    """Qwen and GLM: the patches of a feature lie side by side; Qwen2.5 orders the features by windows and undoes it afterwards."""
    tower = model.base_model.visual
    s = tower.spatial_merge_size**2
    total = sum(num_features)
    place = torch.arange(total)
    if hasattr(tower, "window_size"):
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

        window_index, _ = get_vision_window_index(
            inputs["image_grid_thw"],
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        place = window_index.cpu().argsort()
    patches = place[:, None] * s + torch.arange(s)
    return list(patches.split(list(num_features))), 0


_INDEX = {"grid": _grid_index, "tiles": _tiles_index, "blocks": _blocks_index}
