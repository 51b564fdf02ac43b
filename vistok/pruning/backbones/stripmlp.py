"""Strip-MLP: token mixing along rows and columns that also sees the strips beside them.

Cao et al. 2023, "Strip-MLP: Efficient Token Interaction for Vision MLP", arXiv 2307.11458, section 3.

    block      x + TokenMix(x);  x + ChannelMix(x)
    TokenMix   BN, GELU, depthwise 3x3, then the strip block: 1x1 conv, BN, GELU, split the channels into a | b,
               cat(CGSMM(a), LSMM(b)), 1x1 conv
    CGSMM      rows:  y[g,c,h,:] = sum_{t=-1,0,1} W_t[c] x[g,c,h+t,:] + bias[c,:]         W_t[c] is W x W, shared by the G groups g
               h = rows(a + pos_h);  h = GELU(BN(fuse_h cat(h, a))) + pos_w;  w = columns(h);  out = fuse_w cat(a, w)
    LSMM       u = 3x7, v = 7x3 depthwise;  (s_v, s_u, s_b) = softmax(MLP(mean(v + u + b)));  out = s_v v + s_u u + s_b b
    ChannelMix depthwise 7x7, LayerNorm, Linear, GELU, GRN, Linear

Strip weights are tied to a square grid: images of another size are refused. B batch, C channels, H = W grid side, G groups.
"""

from dataclasses import dataclass

import torch
from timm.layers import DropPath
from timm.models import register_model
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class StripMLPConfig:
    """Shape of a Strip-MLP."""

    img_size: int = 224
    patch_size: int = 4
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: int = 80
    """Width of the first stage; it doubles in each of the four."""
    layers: tuple[int, ...] = (2, 2, 12, 2)
    alpha: int = 3
    """Expansion of the channel mixing; the reference fixes the size of its GRN to 3."""
    drop_path: float = 0.1

    def __post_init__(self):
        if len(self.layers) != 4:
            raise ValueError(f"layers={self.layers} but there are four stages")
        if self.img_size % (8 * self.patch_size):
            raise ValueError(f"img_size={self.img_size} is no multiple of {8 * self.patch_size}, the stride of the last stage")


class RelativePosition(nn.Module):
    """pos[c, i, j] = table[j - i + n, c], added to every group of channels."""

    def __init__(self, channels: int, side: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(2 * side + 1, channels))
        nn.init.trunc_normal_(self.table, std=0.02)
        offset = torch.arange(side)[None, :] - torch.arange(side)[:, None] + side
        self.register_buffer("offset", offset, persistent=False)

    def forward(self) -> Tensor:
        return self.table[self.offset].permute(2, 0, 1)


class StripMix(nn.Module):
    """CGSMM: cascaded mixing of rows, then of columns."""

    def __init__(self, channels: int, side: int, num_groups: int):
        super().__init__()
        self.num_groups, width = num_groups, channels // num_groups
        self.rows = nn.Conv2d(width * side, width * side, (1, 3), padding=(0, 1), groups=width)
        self.columns = nn.Conv2d(width * side, width * side, (1, 3), padding=(0, 1), groups=width)
        self.position_rows = RelativePosition(channels, side)
        self.position_columns = RelativePosition(channels, side)
        self.fuse_rows = nn.Conv2d(2 * channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.fuse_columns = nn.Conv2d(2 * channels, channels, 1, bias=False)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, H], returns the same shape."""
        h = self._strips(self.rows, x + self.position_rows())
        h = self.act(self.norm(self.fuse_rows(torch.cat([h, x], dim=1)))) + self.position_columns()
        w = self._strips(self.columns, h.transpose(2, 3)).transpose(2, 3)
        return self.fuse_columns(torch.cat([x, w], dim=1))

    def _strips(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Mix the last axis of x [B, C, H, W] and its neighbouring strips along H: channels (c, W) on the plane (G, H)."""
        W = x.shape[3]
        x = x.unflatten(1, (self.num_groups, -1)).permute(0, 2, 4, 1, 3)  # [B, c, W, G, H]
        return conv(x.flatten(1, 2)).unflatten(1, (-1, W)).permute(0, 3, 1, 4, 2).flatten(1, 2)


class LocalMix(nn.Module):
    """LSMM: two short strips and the input, weighted by what the whole map shows."""

    def __init__(self, channels: int):
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, (3, 7), padding=(1, 3), groups=channels, bias=False)
        self.tall = nn.Conv2d(channels, channels, (7, 3), padding=(3, 1), groups=channels, bias=False)
        self.squeeze = nn.Conv2d(channels, channels // 2, 1)
        self.act = nn.GELU()
        self.excite = nn.Conv2d(channels // 2, 3 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W], returns the same shape."""
        wide, tall = self.wide(x), self.tall(x)
        pooled = (tall + wide + x).mean(dim=(2, 3), keepdim=True)
        weight = self.excite(self.act(self.squeeze(pooled))).unflatten(1, (-1, 3)).softmax(dim=2)  # [B, C, 3, 1, 1]
        return weight[:, :, 0] * tall + weight[:, :, 1] * wide + weight[:, :, 2] * x


class StripBlock(nn.Module):
    """1x1 conv, then CGSMM on one half of the channels and LSMM on the other."""

    def __init__(self, channels: int, side: int):
        super().__init__()
        self.project = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.GELU())
        self.strips = StripMix(channels // 2, side, 2 if channels % 80 == 0 else 4)
        self.local = LocalMix(channels // 2)
        self.fuse = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, H], returns the same shape."""
        a, b = self.project(x).chunk(2, dim=1)
        return self.fuse(torch.cat([self.strips(a), self.local(b)], dim=1))


class ChannelMix(nn.Module):
    """Depthwise 7x7, then an MLP with global response normalisation (ConvNeXt V2)."""

    def __init__(self, channels: int, expansion: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels, bias=False)
        self.norm = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, expansion * channels)
        self.act = nn.GELU()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, expansion * channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, expansion * channels))
        self.out = nn.Linear(expansion * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W], returns the same shape."""
        x = self.act(self.up(self.norm(self.conv(x).permute(0, 2, 3, 1))))
        response = x.norm(dim=(1, 2), keepdim=True)
        response = response / (response.mean(dim=-1, keepdim=True) + 1e-6)
        x = self.gamma * (x * response) + self.beta + x
        return self.out(x).permute(0, 3, 1, 2)


class Block(nn.Module):
    """x + TokenMix(x); x + ChannelMix(x)."""

    def __init__(self, channels: int, side: int, config: StripMLPConfig):
        super().__init__()
        conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.local = nn.Sequential(nn.BatchNorm2d(channels), nn.GELU(), conv)
        self.strip = StripBlock(channels, side)
        self.channel = ChannelMix(channels, config.alpha)
        self.drop_path = DropPath(config.drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.strip(self.local(x)))
        return x + self.drop_path(self.channel(x))


class StripMLP(nn.Module):
    """The classifier."""

    def __init__(self, config: StripMLPConfig):
        super().__init__()
        self.config, self.num_classes = config, config.num_classes
        widths = [config.embed_dim << stage for stage in range(4)]
        side = config.img_size // config.patch_size
        self.num_features = widths[-1]
        self.embed = nn.Conv2d(config.in_chans, widths[0], config.patch_size, config.patch_size, bias=False)
        self.stages = nn.ModuleList(
            nn.Sequential(*[Block(widths[stage], side >> stage, config) for _ in range(depth)]) for stage, depth in enumerate(config.layers)
        )
        self.down = nn.ModuleList(nn.Conv2d(widths[stage], widths[stage + 1], 2, 2, bias=False) for stage in range(3))

        def half(stage: int) -> nn.Conv2d:
            return nn.Conv2d(widths[stage], widths[stage + 1], 2, 2, groups=widths[stage], bias=False)

        self.cross_1_2, self.cross_1_3, self.cross_2_3 = half(1), half(2), half(2)
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], config.num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """x: [B, 3, S, S] with S = img_size. Returns [B, 8 D, h, h], normalised."""
        S = self.config.img_size
        if x.shape[2:] != (S, S):
            raise ValueError(
                f"this Strip-MLP reads {S} x {S} images, got {x.shape[2]} x {x.shape[3]}: its strip weights are tied to the grid"
            )
        x = self.down[0](self.stages[0](self.embed(x)))
        first = self.cross_1_2(x)
        x = self.down[1](self.stages[1](x))
        second = self.cross_1_3(first) + self.cross_2_3(x)
        x = self.down[2](self.stages[2](x + first))
        return self.norm(self.stages[3](x + second))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, 8 D, h, h] to logits [B, num_classes], or to [B, 8 D] with pre_logits."""
        x = x.mean(dim=(2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, 3, S, S]. Returns logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


_BLOCK_NAMES = {
    "token_mixing.dwsc.conv_merge.BN": "local.0",
    "token_mixing.dwsc.conv_merge.Conv": "local.2",
    "token_mixing.smlp_block.mlp.0": "strip.project.0",
    "token_mixing.smlp_block.mlp.1": "strip.project.1",
    "token_mixing.smlp_block.proj_h": "strip.strips.rows",
    "token_mixing.smlp_block.proj_w": "strip.strips.columns",
    "token_mixing.smlp_block.relate_pos_h.embeddings_table": "strip.strips.position_rows.table",
    "token_mixing.smlp_block.relate_pos_w.embeddings_table": "strip.strips.position_columns.table",
    "token_mixing.smlp_block.fuse_h": "strip.strips.fuse_rows",
    "token_mixing.smlp_block.BN": "strip.strips.norm",
    "token_mixing.smlp_block.fuse_w": "strip.strips.fuse_columns",
    "token_mixing.smlp_block.fc_h": "strip.local.wide",
    "token_mixing.smlp_block.fc_w": "strip.local.tall",
    "token_mixing.smlp_block.reweight.fc1": "strip.local.squeeze",
    "token_mixing.smlp_block.reweight.fc2": "strip.local.excite",
    "token_mixing.smlp_block.fuse": "strip.fuse",
    "channel_mixing.conv_77": "channel.conv",
    "channel_mixing.layer_norm": "channel.norm",
    "channel_mixing.fc1": "channel.up",
    "channel_mixing.fc2": "channel.out",
    "channel_mixing.grn.gamma": "channel.gamma",
    "channel_mixing.grn.beta": "channel.beta",
}
_NAMES = {
    "patch_embed": "embed",
    "merging1": "down.0",
    "merging2": "down.1",
    "merging3": "down.2",
    "conv_s1_28": "cross_1_2",
    "conv_s1_14": "cross_1_3",
    "conv_s2_14": "cross_2_3",
    "norm": "norm",
    "head": "head",
}


def from_official(state: dict[str, Tensor], config: StripMLPConfig) -> dict[str, Tensor]:
    """The reference's weights under our names."""
    names = dict(_official_names(config))
    if set(state) != set(names):
        raise ValueError(f"not the weights of this Strip-MLP: {sorted(set(state) ^ set(names))[:6]} are missing or unknown")
    return {names[theirs]: tensor for theirs, tensor in state.items()}


def to_official(state: dict[str, Tensor], config: StripMLPConfig) -> dict[str, Tensor]:
    """The inverse of `from_official`."""
    return {theirs: state[ours] for theirs, ours in _official_names(config)}


def _official_names(config: StripMLPConfig) -> list[tuple[str, str]]:
    """(their name, our name) of every tensor."""
    parts = dict(_NAMES)
    for stage, depth in enumerate(config.layers):
        for b in range(depth):
            parts.update({f"blocks{stage + 1}.{b}.{theirs}": f"stages.{stage}.{b}.{ours}" for theirs, ours in _BLOCK_NAMES.items()})
    theirs = {ours: name for name, ours in parts.items()}
    with torch.device("meta"):
        ours = list(StripMLP(config).state_dict())
    pairs = []
    for name in ours:
        module, _, leaf = name.rpartition(".")
        pairs.append((theirs[name], name) if name in theirs else (f"{theirs[module]}.{leaf}", name))
    return pairs


def _create(embed_dim: int, layers: tuple[int, ...], options: dict) -> StripMLP:
    if options.pop("pretrained", False):
        raise ValueError("there are no pretrained Strip-MLP weights to download: `from_official` loads official ones, `vistok.load` own")
    known = {"num_classes", "in_chans", "img_size", "drop_path_rate"}
    unknown = set(options) - known - {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
    if unknown:
        raise TypeError(f"unknown options {sorted(unknown)}; there are {', '.join(sorted(known))}")
    chosen = {("drop_path" if name == "drop_path_rate" else name): value for name, value in options.items() if name in known}
    return StripMLP(StripMLPConfig(embed_dim=embed_dim, layers=layers, **chosen))


@register_model
def stripmlp_t_light(**options) -> StripMLP:
    """Strip-MLP-T*: 18.2 M parameters, 2.5 GMACs."""
    return _create(80, (2, 2, 6, 2), options)


@register_model
def stripmlp_t(**options) -> StripMLP:
    """Strip-MLP-T: 24.9 M parameters, 3.7 GMACs."""
    return _create(80, (2, 2, 12, 2), options)


@register_model
def stripmlp_s(**options) -> StripMLP:
    """Strip-MLP-S: 42.6 M parameters, 6.8 GMACs."""
    return _create(96, (2, 2, 18, 2), options)


@register_model
def stripmlp_b(**options) -> StripMLP:
    """Strip-MLP-B: 57.2 M parameters, 9.2 GMACs."""
    return _create(112, (2, 2, 18, 2), options)
