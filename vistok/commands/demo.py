"""`vistok demo`: look at what the bundled models do; or train a pair of models and look at those."""

from dataclasses import dataclass
from pathlib import Path

from vistok.commands.common import Device, Threads, optional, shown, shows_progress, use_device


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Write a page of pictures: reconstructions at 1, 2, 4, ... tokens, new images of every class, and measured figures.

    Open OUT/index.html when it is done. Without --train it shows the models that come with the package on emoji they have never seen, in
    under 3 minutes on two CPU cores. With --train it does the whole job first, in under 10 minutes: a tokenizer (fsq2d-emoji), a generator
    on its tokens (gpt-emoji), then samples, figures, and the nearest training image of each sample. Typed again, it goes on where it was.

        vistok demo --out demo
        vistok demo --train --out demo-train
        vistok demo --train --data PHOTOS --out demo-photos                  your own folder of images
    """

    out: shown(Path, "DIR") = Path("vistok-demo")
    """Folder for index.html, pictures, figures, and the runs of --train."""
    train: bool = False
    """Train a tokenizer and a generator from nothing, and show those."""
    data: shown(str, "PATH|emoji") = "emoji"
    """Images: held-out ones are reconstructed, the others are trained on."""
    tokenizer_steps: optional(int, "N", "default: 1200") = None
    """With --train: optimizer steps of the tokenizer."""
    generator_steps: optional(int, "N", "default: 1400") = None
    """With --train: optimizer steps of the generator."""
    num_images: int = 160
    """Held-out images that are measured."""
    num_samples: int = 6
    """New images of each class."""
    seed: int = 0
    """Of training, noise, samples and the choice of images."""
    device: Device = None
    """Where the models run: cpu, cuda, cuda:1, mps."""
    threads: Threads = None
    """CPU threads of torch."""

    def run(self) -> None:
        from vistok.demo import demo, train_demo

        if not self.train and (self.tokenizer_steps is not None or self.generator_steps is not None):
            raise ValueError("--tokenizer-steps and --generator-steps are for --train")
        for name, low in (("num_images", 2), ("num_samples", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        options = {name: getattr(self, name) for name in ("data", "num_images", "num_samples", "seed")}
        options |= {"device": use_device(self.device, self.threads), "progress": shows_progress()}
        if self.train:
            steps = {"tokenizer_steps": self.tokenizer_steps, "generator_steps": self.generator_steps}
            report = train_demo(self.out, **steps, threads=self.threads, **options)
            for result in report.pipelines:
                print("\n".join(["nearest training image of each sample:", *result.nearest, ""]))
        else:
            report = demo(self.out, **options)
        print(report.text())
        print(f"\n{self.out / 'index.html'}")
