"""Feature nets: what two sets of images are compared through. A distance without the name of its features means nothing.

| name | features | weights |
|---|---|---|
| `pixels`, `pixels:16` | the pixels, at full size or area-averaged to 16 x 16 | none |
| `conv`, `conv:64` | random convolution features at 64 x 64 pixels (see `ConvFeatures`) | none: made from a fixed seed |
| `timm:NAME[@FILE]` | pooled features of a timm model | FILE (.safetensors or .pth), else timm's own download |
| `torchvision:NAME[@FILE]` | input of the last linear layer of a torchvision classifier | FILE, else torchvision's own download |
| `transformers:FOLDER` | pooled output of a transformers vision model | the folder (a hub id works where there is a network) |
| `inception[@FILE]` | the 2048 pooled features behind FID, through torch-fidelity | FILE or the copy in torch's cache, else a download |
| `vistok:MODEL` | the tokens of a vistok tokenizer (a KL-VAE's latents, a codebook's code vectors) | any vistok model |

B images, D width of the features.
"""

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV_SEED = 20170626


@runtime_checkable
class FeatureNet(Protocol):
    """Images [B, 3, H, W] in [-1, 1] -> features [B, D]. `name` and `preprocess` go into the protocol beside every number."""

    name: str
    preprocess: str

    def __call__(self, images: Tensor) -> Tensor:
        """Features [B, D] float of images [B, 3, H, W] in [-1, 1]."""


def feature_net(spec: str, *, device: torch.device | str = "cpu") -> FeatureNet:
    """Build a feature net from its name in the table above.

    Weights files are read as safetensors or with `weights_only=True`, never executed.

    Raises ValueError: the name is not known. OSError: its weights are neither given, nor cached, nor reachable.
    """
    kind, _, rest = spec.partition(":")
    if kind in ("pixels", "conv"):
        size = _size_of(spec, rest)
        return (PixelFeatures(size) if kind == "pixels" else ConvFeatures(size or 64)).to(device)
    if kind == "vistok" and rest:
        return TokenFeatures(rest, device)
    from vistok.metrics import backbones

    name, _, file = rest.partition("@")
    if kind == "timm" and name:
        return backbones.timm_features(name, file or None).to(device)
    if kind == "torchvision" and name:
        return backbones.torchvision_features(name, file or None).to(device)
    if kind == "transformers" and rest:
        return backbones.transformers_features(rest).to(device)
    if spec == "inception" or spec.startswith("inception@"):
        return backbones.InceptionFeatures(spec.partition("@")[2] or None).to(device)
    raise ValueError(
        f"features {spec!r} are not known; allowed: pixels, pixels:SIZE, conv, conv:SIZE, timm:NAME[@FILE], torchvision:NAME[@FILE], "
        "transformers:FOLDER, inception[@FILE], vistok:MODEL"
    )


@torch.inference_mode()
def features_of(net: FeatureNet, images: Tensor) -> Tensor:
    """Features of a batch as float32 [B, D] on the CPU, without gradients."""
    return net(images).float().cpu()


def resize(images: Tensor, size: int | tuple[int, int], *, mode: str = "bilinear") -> Tensor:
    """Resize [B, 3, H, W], antialiased, clamped to [-1, 1]; images of the right size pass unchanged."""
    height, width = (size, size) if isinstance(size, int) else size
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode=mode, antialias=True, align_corners=False).clamp(-1, 1)


class PixelFeatures(nn.Module):
    """The pixels themselves, averaged over areas down to size x size. Blind to shifts of a pixel; good for layout and colour."""

    def __init__(self, size: int | None):
        super().__init__()
        self.size = size
        self.name = "pixels" if size is None else f"pixels:{size}"
        self.preprocess = "none" if size is None else f"area average to {size} x {size}"

    def forward(self, images: Tensor) -> Tensor:
        images = images.float()
        return (images if self.size is None else F.adaptive_avg_pool2d(images, self.size)).flatten(1)


class ConvFeatures(nn.Module):
    """Random convolution features: a fixed space of our own that needs no weights, the same on every machine up to rounding.

    Images at size x size, halved twice; at each of the 3 scales 16 orthonormal random 5 x 5 x 3 filters (Gaussian, from a fixed seed),
    ReLU, then mean and standard deviation over each cell of a 4 x 4 grid: D = 3 * 16 * 2 * 16 = 1,536. It sees colour, edges, texture
    and coarse layout; it knows no objects. After Jarrett et al. 2009, "What is the best multi-stage architecture for object
    recognition?", where random filters come near trained ones once rectified and pooled.
    """

    num_scales, num_filters, kernel_size, grid = 3, 16, 5, 4

    def __init__(self, size: int = 64):
        super().__init__()
        smallest = self.grid * 2 ** (self.num_scales - 1)
        if size < smallest or size % smallest:
            raise ValueError(f"conv features need a size that is a multiple of {smallest}, got {size}")
        self.size = size
        self.name = f"conv:{size}"
        self.preprocess = f"bilinear antialiased resize to {size} x {size}; 3 scales, 16 random 5 x 5 filters, mean and std on a 4 x 4 grid"
        generator = torch.Generator().manual_seed(CONV_SEED)
        fan_in = 3 * self.kernel_size**2
        filters = []
        for _ in range(self.num_scales):
            basis, upper = torch.linalg.qr(torch.randn(fan_in, self.num_filters, generator=generator, dtype=torch.float64))
            basis = basis * upper.diagonal().sign()  # makes the factorisation unique, so every LAPACK gives the same filters
            filters.append(basis.T.reshape(self.num_filters, 3, self.kernel_size, self.kernel_size).float())
        self.register_buffer("filters", torch.stack(filters), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, D] of images [B, 3, H, W] in [-1, 1]: mean and deviation of each filter's response in each cell of a grid."""
        x = resize(images.to(self.filters), self.size)
        features = []
        for filters in self.filters:
            padded = F.pad(x, [self.kernel_size // 2] * 4, mode="reflect")
            response = F.conv2d(padded, filters).relu()
            mean = F.adaptive_avg_pool2d(response, self.grid)
            variance = F.adaptive_avg_pool2d(response.square(), self.grid) - mean.square()
            features += [mean.flatten(1), variance.clamp(min=0).sqrt().flatten(1)]
            x = F.avg_pool2d(x, 2)
        return torch.cat(features, dim=1)


class TokenFeatures:
    """The tokens of a vistok tokenizer, flattened: values as they are, ids as their code vectors. Image size is that of the images."""

    def __init__(self, source: str, device: torch.device | str):
        from vistok.registry import load

        self.tokenizer = load(source).to(device).eval()
        self.device = torch.device(device)
        self.name = f"vistok:{source}"
        self.preprocess = "none; all tokens of the image, flattened"

    def __call__(self, images: Tensor) -> Tensor:
        tokens = self.tokenizer.encode(images.to(self.device))
        values = tokens.values if tokens.ids is None else self.tokenizer.embed(tokens.ids)
        return values.flatten(1)


def _size_of(spec: str, text: str) -> int | None:
    if not text and ":" not in spec:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"features {spec!r}: the size after the colon must be a positive number, got {text!r}")
    return int(text)
