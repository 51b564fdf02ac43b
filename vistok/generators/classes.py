"""What generators share that can be asked for classes: fields of the config, their checks, conditions of classes alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vistok.generators.condition import Condition, check_classes, class_condition
from vistok.tokens import TokenLayout


@dataclass(frozen=True, kw_only=True)
class ClassConfig:
    """A transformer of heads, and its classes."""

    width: int = 768
    """D."""
    num_heads: int = 12
    """h: attention heads."""
    num_classes: int = 1000
    """C: classes a picture can be asked of; 0: unconditional."""
    classes: tuple[str, ...] = ()
    """Names of the classes, if they have names."""

    def __post_init__(self):
        object.__setattr__(self, "classes", tuple(self.classes))
        check_least(self, width=1, num_heads=1, num_classes=0)
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        check_classes(self.classes, self.num_classes)


@dataclass(frozen=True, kw_only=True)
class LayoutConfig(ClassConfig):
    """A generator of classes alone over the ids of any tokenizer."""

    codebook_size: int
    """K: codes of the tokenizer."""
    layout_kind: str = "grid"
    """How the tokens are laid out: "grid" or "sequence"."""
    layout_shape: tuple[int, ...] = (16, 16)
    """Shape of a full image's tokens."""
    depth: int = 24
    """Blocks."""
    num_heads: int = 16
    hidden: int = 3072
    """Width inside the feed-forward layers."""

    text = "none"  # what a pipeline asks a generator: this one reads no captions

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "layout_shape", tuple(self.layout_shape))
        check_least(self, codebook_size=1, depth=1)

    @property
    def layout(self) -> TokenLayout:
        """Where the tokens of a full image sit."""
        return TokenLayout(self.layout_kind, self.layout_shape)


class ClassConditioned:
    """Conditions of a model that reads classes and no captions."""

    def make_condition(
        self,
        batch_size: int,
        *,
        labels: Tensor | Sequence[int] | None = None,
        captions: Sequence[str] | None = None,
        features: tuple[Tensor, Tensor] | None = None,
    ) -> Condition:
        """Conditions of B images on the model's device: labels [B], -1 for none; all none without them.

        Raises ValueError: a label is no class, or captions are given, which this generator does not read.
        """
        options = {"labels": labels, "captions": captions, "features": features}
        return class_condition(batch_size, self.settings.num_classes, self.device, **options)


def check_least(config, **least: float) -> None:
    """Raises ValueError: a field is below the least it can be; the message names it."""
    for name, low in least.items():
        if getattr(config, name) < low:
            raise ValueError(f"{name} must be at least {low}, got {getattr(config, name)}")
