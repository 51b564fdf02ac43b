"""Pretrained networks as feature nets: timm, torchvision, transformers, and the Inception of FID; each library is imported where used.

A weights file is safetensors or a pickle read with `weights_only=True`; the first digits of its SHA-256 become part of the net's name, its
folder does not. Images are already square crops, so they are resized to the net's input size and never cropped again.
"""

import hashlib
import logging
import os
import pickle
import tempfile
import urllib.error
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from vistok.metrics.features import resize

logger = logging.getLogger("vistok")
OFFICIAL_INCEPTION = "6726825d"  # first digits of the SHA-256 of the file behind published FID values
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class BackboneFeatures(nn.Module):
    """A network behind its own preprocessing: resize, [-1, 1] -> normalised input, pooled output.

    pool: what the network returns -> features [B, D].
    """

    def __init__(
        self, network: nn.Module, *, name: str, size: tuple[int, int], mean, std, mode: str = "bicubic", pool: Callable | None = None
    ):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.name, self.size, self.mode, self.pool = name, tuple(size), mode, pool
        self.preprocess = f"{mode} antialiased resize to {size[0]} x {size[1]}, no crop, mean {_rounded(mean)}, std {_rounded(std)}"
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "BackboneFeatures":
        """Always in evaluation mode: statistics of a batch must not enter a feature."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        pixels = (resize(images.to(self.mean), self.size, mode=self.mode) + 1) / 2
        output = self.network((pixels - self.mean) / self.std)
        return (output if self.pool is None else self.pool(output)).flatten(1)


def timm_features(name: str, file: str | None) -> BackboneFeatures:
    """Pooled features of a timm model before its classifier."""
    import timm
    from timm.data import resolve_model_data_config

    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}; timm.list_models() lists them")
    try:
        network = timm.create_model(name, pretrained=file is None, num_classes=0)
    except (OSError, RuntimeError) as error:
        raise _no_weights(f"timm:{name}", error) from error
    if file is not None:
        _load(network, read_weights(file), f"timm:{name}")
    data = resolve_model_data_config(network)
    mode = data["interpolation"] if data["interpolation"] in ("bilinear", "bicubic") else "bicubic"
    return BackboneFeatures(
        network, name=_named(f"timm:{name}", file), size=data["input_size"][1:], mean=data["mean"], std=data["std"], mode=mode
    )


def torchvision_features(name: str, file: str | None) -> BackboneFeatures:
    """Input of the last linear layer of a torchvision classifier, at 224 x 224 with ImageNet normalisation."""
    from torchvision.models import get_model

    try:
        network = get_model(name, weights="DEFAULT" if file is None else None)
    except (OSError, RuntimeError) as error:
        raise _no_weights(f"torchvision:{name}", error) from error
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"torchvision:{name} ends in no linear layer, so it has no pooled features")
    network.set_submodule(linear[-1], nn.Identity())
    if file is not None:
        _load(network, read_weights(file), f"torchvision:{name}")
    return BackboneFeatures(network, name=_named(f"torchvision:{name}", file), size=(224, 224), mean=IMAGENET_MEAN, std=IMAGENET_STD)


def transformers_features(source: str) -> BackboneFeatures:
    """Pooled features of a transformers vision model (CLIP-like models: their image embedding); safetensors weights, no remote code."""
    try:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel
    except ImportError as error:
        raise ImportError("transformers: features need transformers: pip install vistok[vlm]") from error
    try:
        model = AutoModel.from_pretrained(source, use_safetensors=True, trust_remote_code=False)
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        raise _no_weights(f"transformers:{source}", error, example="transformers:FOLDER") from error
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    side = getattr(config, "image_size", None) or _side(processor)
    size = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
    network = _ImageTower(model) if hasattr(model, "get_image_features") else model
    label = f"transformers:{Path(source).name}" if Path(source).is_dir() else f"transformers:{source}"
    return BackboneFeatures(
        network, name=label, size=size, mean=tuple(processor.image_mean), std=tuple(processor.image_std), pool=_pooled_output
    )


class InceptionFeatures(nn.Module):
    """The 2,048 pooled features of the original FID Inception, by torch-fidelity: 8-bit images, a TensorFlow-like resize to 299 x 299.

    Only with the official weights is the net's name `inception`, and only on that net is a Frechet distance called FID.
    """

    def __init__(self, file: str | None):
        super().__init__()
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as fidelity
        except ImportError as error:
            raise ImportError("inception features need torch-fidelity: pip install vistok[eval]") from error
        if file is None:
            try:
                weights = torch.hub.load_state_dict_from_url(
                    fidelity.URL_INCEPTION_V3, map_location="cpu", progress=False, check_hash=True, weights_only=True
                )
            except OSError as error:
                raise _no_weights("inception", error, example=f"inception@FILE with the file from {fidelity.URL_INCEPTION_V3}") from error
        else:
            weights = read_weights(file)
        # torch-fidelity unpickles its file without limits: it gets a copy written here, of tensors that were read safely
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "inception.pth")
            torch.save(weights, path)
            self.network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
        is_official = file is None or _digest(file).startswith(OFFICIAL_INCEPTION)
        self.name = "inception" if is_official else _named("inception", file)
        self.preprocess = "8-bit images, TensorFlow-1 bilinear resize to 299 x 299 (torch-fidelity)"

    def forward(self, images: Tensor) -> Tensor:
        pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return self.network(pixels.to(self.network.fc.weight.device))[0]


def read_weights(file: str) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a pickle that holds nothing but tensors (a `state_dict` or `model` inside is taken).

    Raises OSError: no such file. ValueError: it holds anything else.
    """
    path = Path(file)
    if not path.is_file():
        raise OSError(f"there is no weights file {file!r}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path.name} is not a plain file of tensors: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(weights, dict) and isinstance(weights.get(key), dict):
            weights = weights[key]
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path.name} holds no table of named tensors")
    return weights


class _ImageTower(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor):
        return self.model.get_image_features(pixel_values=pixels)


def _pooled_output(output) -> Tensor:
    if isinstance(output, Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    if pooled is not None:
        return pooled
    hidden = output.last_hidden_state
    return hidden.mean(dim=1) if hidden.ndim == 3 else hidden.mean(dim=(2, 3))


def _side(processor) -> int:
    size = getattr(processor, "crop_size", None) or processor.size
    return size.get("height") or size.get("shortest_edge")


def _load(network: nn.Module, weights: dict[str, Tensor], name: str) -> None:
    """Every tensor of the network must come from the file; what the file has beyond it (a classifier) is left out and counted in the log.

    A file whose names do not fit, but whose shapes all agree in order, is the same network under other names and is taken in order.
    """
    wanted = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    given = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    bad = [key for key, value in wanted.items() if key not in given or given[key].shape != value.shape]
    in_order = list(given.values())[: len(wanted)]
    if bad and [value.shape for value in wanted.values()] == [value.shape for value in in_order]:
        logger.info("%s: the file names its tensors differently; all %d shapes agree, taken in order", name, len(wanted))
        given, bad = dict(zip(wanted, in_order)), []
    if bad:
        raise ValueError(f"the weights file does not fit {name}: {len(bad)} tensors are missing or of another shape, first {bad[0]!r}")
    extra = [key for key in given if key not in wanted]
    if extra:
        logger.info("%s: %d tensors of the file are not used (first: %s)", name, len(extra), extra[0])
    network.load_state_dict({key: given[key] for key in wanted}, strict=False)  # all but the counters of batch norms, checked above


def _named(name: str, file: str | None) -> str:
    return name if file is None else f"{name}@{Path(file).name}#{_digest(file)}"


def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]


def _rounded(values) -> list[float]:
    return [round(float(value), 3) for value in values]


def _no_weights(name: str, error: Exception, example: str | None = None) -> OSError:
    reason = error.reason if isinstance(error, urllib.error.URLError) else str(error).partition("\n")[0]
    fix = example or f"{name.partition('@')[0]}@FILE"
    return OSError(f"the weights of {name} are not here and could not be fetched ({reason}); give them as {fix}, or use features 'conv'")
