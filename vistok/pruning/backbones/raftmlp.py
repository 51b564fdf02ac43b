"""RaftMLP: an image classifier without attention; spatial mixing along columns and rows, over small groups ("rafts") of channels.

Tatsunami and Taki 2021, "RaftMLP: How Much Can Be Done Without Attention and with Less Spatial Locality?", arXiv 2108.04384, section 3.

    level i      embed: patches of several sizes around each cell, side by side, then one Linear          stride p
                 depth times: vertical, horizontal, channel mixing, each  x + MLP(LayerNorm(x))
    vertical     for a channel c and column: MLP over the r h values of (raft, row); horizontal: over (raft, column)
    head         LayerNorm, mean, Linear; with shortcuts out = last; backwards over the levels  out = v[:, :D] out + v[:, D:]

The token mixers are tied to the grid of the training resolution. At another one the feature map is resampled (bicubic) to that grid and
back around them. r rafts, channel = raft * (C/r) + c.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import register_model
from torch import Tensor, nn

from vistok.layers.mlp import MLP


@dataclass(frozen=True, kw_only=True)
class RaftLevel:
    """One resolution."""

    dim: int
    depth: int
    patch_size: int
    raft_size: int = 2
    embedding_kernels: tuple[int, ...] = ()
    """Sizes of the patches around each cell, the first is patch_size; only for embedding_type="emb_cross_mlp"."""


@dataclass(frozen=True, kw_only=True)
class RaftMLPConfig:
    """Shape of a RaftMLP."""

    layers: tuple[RaftLevel, ...]
    in_channels: int = 3
    pretrained_image_size: int = 224
    """Fixes the grids of the token mixers; other image sizes are resampled inside."""
    num_classes: int = 1000
    token_expansion_factor: int = 2
    channel_expansion_factor: int = 4
    embedding_type: str = "emb_cross_mlp"
    """emb_cross_mlp (several patch sizes) or emb_mixer (plain patches)."""
    token_mixing_type: str = "ser_pm"
    """ser_pm: vertical then horizontal raft mixing, the only one."""
    shortcut: bool = False
    """Whether the head sees every level."""
    drop_path: float = 0.1

    def __post_init__(self):
        if self.token_mixing_type != "ser_pm":
            raise ValueError(f"token_mixing_type={self.token_mixing_type!r} but only ser_pm is supported")
        if self.embedding_type not in ("emb_cross_mlp", "emb_mixer"):
            raise ValueError(f"embedding_type={self.embedding_type!r} but it is emb_cross_mlp or emb_mixer")
        for level in self.layers:
            if level.dim % level.raft_size:
                raise ValueError(f"dim={level.dim} does not divide into rafts of {level.raft_size} channels")
            kernels = level.embedding_kernels
            if self.embedding_type == "emb_cross_mlp":
                if not kernels or kernels[0] != level.patch_size or any(kernel % level.patch_size for kernel in kernels):
                    raise ValueError(
                        f"embedding_kernels={kernels} but they are multiples of patch_size={level.patch_size}, the first equal to it"
                    )

    @classmethod
    def from_dict(cls, config: dict) -> "RaftMLPConfig":
        """From plain data with a list of levels."""
        levels = [RaftLevel(**{**level, "embedding_kernels": tuple(level.get("embedding_kernels", ()))}) for level in config["layers"]]
        return cls(**{**config, "layers": tuple(levels)})


class Embedding(nn.Module):
    """Patches to tokens, stride p."""

    def __init__(self, in_channels: int, level: RaftLevel, kind: str):
        super().__init__()
        self.patch_size = level.patch_size
        self.kernels = level.embedding_kernels if kind == "emb_cross_mlp" else (level.patch_size,)
        self.is_channel_last = kind == "emb_mixer"
        self.fc = nn.Linear(in_channels * sum(kernel**2 for kernel in self.kernels), level.dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W]; sides that p does not divide are resized up. Returns [B, D, H/p, W/p]."""
        p = self.patch_size
        H, W = -(-x.shape[2] // p) * p, -(-x.shape[3] // p) * p
        x = _resize(x, (H, W))
        patches = [F.unfold(x, kernel, stride=p, padding=(kernel - p) // 2) for kernel in self.kernels]  # [B, C k k, N]
        if self.is_channel_last:
            patches = [patches[0].unflatten(1, (-1, p * p)).transpose(1, 2).flatten(1, 2)]
        return self.fc(torch.cat(patches, dim=1).transpose(1, 2)).transpose(1, 2).unflatten(2, (H // p, W // p))


class Mixer(nn.Module):
    """x + MLP(LayerNorm(x)) along one axis: "vertical", "horizontal" (raft and position) or "channel"."""

    def __init__(self, dim: int, raft_size: int, axis: str, length: int, expansion: int, drop_path: float):
        super().__init__()
        self.axis, self.raft_size = axis, raft_size
        self.norm = nn.LayerNorm(dim)
        width = dim if axis == "channel" else raft_size * length
        self.mlp = MLP(width, expansion * width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, D, h, w], returns the same shape."""
        y = self.norm(x.permute(0, 2, 3, 1))
        if self.axis == "channel":
            return x + self.drop_path(self.mlp(y).permute(0, 3, 1, 2))
        order = (0, 4, 2, 3, 1) if self.axis == "vertical" else (0, 4, 1, 3, 2)  # [B, c, other side, raft, mixed side]
        y = y.unflatten(3, (self.raft_size, -1)).permute(order)
        y = self.mlp(y.flatten(3)).unflatten(3, (self.raft_size, -1))
        y = y.permute((0, 3, 1, 4, 2) if self.axis == "vertical" else (0, 3, 1, 2, 4))  # [B, raft, c, h, w]
        return x + self.drop_path(y.flatten(1, 2))


class Block(nn.Module):
    """Vertical and horizontal mixing on the training grid, then channel mixing."""

    def __init__(self, level: RaftLevel, grid: int, config: RaftMLPConfig):
        super().__init__()
        self.grid = grid
        args = level.dim, level.raft_size
        self.vertical = Mixer(*args, "vertical", grid, config.token_expansion_factor, config.drop_path)
        self.horizontal = Mixer(*args, "horizontal", grid, config.token_expansion_factor, config.drop_path)
        self.channel = Mixer(*args, "channel", 1, config.channel_expansion_factor, config.drop_path)

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[2:]
        x = self.horizontal(self.vertical(_resize(x, (self.grid, self.grid))))
        return self.channel(_resize(x, side))


class RaftMLP(nn.Module):
    """The classifier. `forward_features` gives the feature map of every level."""

    def __init__(self, config: RaftMLPConfig):
        super().__init__()
        self.config, self.num_classes = config, config.num_classes
        channels, grid = config.in_channels, config.pretrained_image_size
        self.embeddings, self.levels = nn.ModuleList(), nn.ModuleList()
        for level in config.layers:
            grid = -(-grid // level.patch_size)
            self.embeddings.append(Embedding(channels, level, config.embedding_type))
            self.levels.append(nn.Sequential(*[Block(level, grid, config) for _ in range(level.depth)]))
            channels = level.dim
        seen = config.layers if config.shortcut else config.layers[-1:]
        self.norms = nn.ModuleList([nn.LayerNorm(level.dim) for level in seen])
        self.gates = nn.ModuleList([nn.Linear(level.dim, 2 * channels) for level in seen[:-1]])
        self.num_features = channels
        self.classifier = nn.Linear(channels, config.num_classes)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """x: [B, C, H, W]. Returns the maps [B, D_i, h_i, w_i] of all levels."""
        maps = []
        for embedding, blocks in zip(self.embeddings, self.levels):
            x = blocks(embedding(x))
            maps.append(x)
        return maps

    def forward_head(self, maps: list[Tensor], pre_logits: bool = False) -> Tensor:
        """The maps of all levels to [B, num_classes], or to [B, D] with pre_logits."""
        pooled = [norm(x.flatten(2).transpose(1, 2)).mean(dim=1) for norm, x in zip(self.norms, maps[-len(self.norms) :])]
        out = pooled[-1]
        for gate, x in zip(reversed(self.gates), reversed(pooled[:-1])):
            scale, shift = gate(x).chunk(2, dim=-1)
            out = scale * out + shift
        return out if pre_logits else self.classifier(out)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W]. Returns logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


def from_official(state: dict[str, Tensor], config: RaftMLPConfig) -> dict[str, Tensor]:
    """The reference's weights under our names. Its norms inside raft mixing order channels (c, raft); ours are (raft, c)."""
    return {ours: _swap(state[theirs], rafts, True) for theirs, ours, rafts in _names(config, state)}


def to_official(state: dict[str, Tensor], config: RaftMLPConfig) -> dict[str, Tensor]:
    """The inverse of `from_official`."""
    return {theirs: _swap(state[ours], rafts, False) for theirs, ours, rafts in _names(config, None)}


def _swap(weight: Tensor, rafts: int, is_from: bool) -> Tensor:
    return weight.view((-1, rafts) if is_from else (rafts, -1)).T.flatten() if rafts else weight


def _names(config: RaftMLPConfig, state: dict[str, Tensor] | None) -> list[tuple[str, str, int]]:
    """(their name, our name, rafts whose order differs or 0) of every tensor; with a state, all of its names must be among them."""
    pairs = []
    for i, level in enumerate(config.layers):
        embed = "fn.0.fc" if config.embedding_type == "emb_cross_mlp" else "fn.1"
        pairs.append((f"levels.{i}.{embed}", f"embeddings.{i}.fc", 0))
        for b in range(level.depth):
            for index, part in ((1, "vertical"), (3, "horizontal"), (5, "channel")):
                theirs, ours = f"levels.{i}.fn.{2 + b}.{index}", f"levels.{i}.{b}.{part}"
                pairs.append(
                    (
                        f"{theirs}.norm" if part == "channel" else f"{theirs}.norm.1",
                        f"{ours}.norm",
                        0 if part == "channel" else level.raft_size,
                    )
                )
                pairs += [(f"{theirs}.fn.0", f"{ours}.mlp.up", 0), (f"{theirs}.fn.3", f"{ours}.mlp.out", 0)]
    num_heads = len(config.layers) if config.shortcut else 1
    pairs += [(f"heads.{i}.1", f"norms.{i}", 0) for i in range(num_heads)]
    pairs += [(f"heads.{i}.3", f"gates.{i}", 0) for i in range(num_heads - 1)]
    pairs.append(("classifier", "classifier", 0))
    names = [(f"{theirs}.{kind}", f"{ours}.{kind}", rafts) for theirs, ours, rafts in pairs for kind in ("weight", "bias")]
    if state is not None and set(state) != {theirs for theirs, _, _ in names}:
        raise ValueError(
            f"not the weights of this RaftMLP: {sorted(set(state) ^ {theirs for theirs, _, _ in names})[:6]} are missing or unknown"
        )
    return names


def _resize(x: Tensor, side: tuple[int, int]) -> Tensor:
    return x if tuple(x.shape[2:]) == tuple(side) else F.interpolate(x, size=side, mode="bicubic", align_corners=False)


def _create(dims: tuple[int, ...], options: dict) -> RaftMLP:
    if options.pop("pretrained", False):
        raise ValueError("there are no pretrained RaftMLP weights to download: `from_official` loads official ones, `vistok.load` own")
    kernels = ((4, 8), (2, 4), (2, 4), (2,))
    shapes = zip(dims, (2, 2, 6, 2), (4, 2, 2, 2), kernels)
    layers = tuple(RaftLevel(dim=dim, depth=depth, patch_size=patch, embedding_kernels=kernel) for dim, depth, patch, kernel in shapes)
    known = {"num_classes": 1000, "in_chans": 3, "img_size": 224, "drop_path_rate": 0.1}
    unknown = set(options) - set(known) - {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
    if unknown:
        raise TypeError(f"unknown options {sorted(unknown)}; there are {', '.join(known)}")
    take = {**known, **options}
    return RaftMLP(
        RaftMLPConfig(
            layers=layers,
            num_classes=take["num_classes"],
            in_channels=take["in_chans"],
            pretrained_image_size=take["img_size"],
            drop_path=take["drop_path_rate"],
        )
    )


@register_model
def raftmlp_s(**options) -> RaftMLP:
    """RaftMLP-S: 9.9 M parameters, 2.1 GMACs at 224."""
    return _create((64, 128, 256, 512), options)


@register_model
def raftmlp_m(**options) -> RaftMLP:
    """RaftMLP-M: 21.4 M parameters, 4.3 GMACs at 224."""
    return _create((96, 192, 384, 768), options)


@register_model
def raftmlp_l(**options) -> RaftMLP:
    """RaftMLP-L: 36.2 M parameters, 6.5 GMACs at 224."""
    return _create((128, 192, 512, 1024), options)
