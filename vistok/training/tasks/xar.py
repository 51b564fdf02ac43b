"""Training of xAR on token folders: the velocity of each entity, given the entities before it, noisy or clean.

    x_e,t = (1 - t_e) x_e + t_e noise,  t_e = sigmoid(normal), each entity its own;   loss = mean |v - (noise - x)|^2
    context "noisy": an entity sees those before it as x_e,t (noisy context learning);  "clean": as they are (teacher forcing)

Ren et al. 2025 (arXiv 2502.20388), section 3.2. Of a VAE x is drawn from the posterior, where the token folder holds its deviations, as in
the paper; of a tokenizer of ids it is code vectors. Every draw is from the sample's own generator.
B images, N tokens, S slots, E entities, C channels, K codes, L blocks, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from vistok import rng
from vistok.data.shards import TokenFolder
from vistok.decoding.flow import code_table, generate_values
from vistok.generators import XAR, Condition, FlowSampling
from vistok.image import make_grid
from vistok.training.tasks.generator import GeneratorTask, GeneratorTaskConfig, TokenBatch, read_batch, spread_rows


@dataclass(frozen=True, kw_only=True)
class XARTaskConfig(GeneratorTaskConfig):
    """As for every generator; token_dropout, label_smoothing and preview_top_k are not used."""

    context: Literal["noisy", "clean"] = "noisy"
    """How an entity sees those before it: noisy, as the paper trains, or clean, teacher forcing to compare with."""
    preview_guidance: float = 2.5
    """Guidance of the preview's last entity."""
    preview_steps: int = 20
    """Euler steps an entity in the preview."""

    def __post_init__(self):
        super().__post_init__()
        if self.context not in ("noisy", "clean"):
            raise ValueError(f"context={self.context!r}; allowed: noisy, clean")


class XARTask(GeneratorTask):
    """Training of every order; parts: tokenizer, tokenizer_reference and held_out as in GeneratorTask."""

    def __init__(self, model: XAR, config: XARTaskConfig | None = None, **parts):
        super().__init__(model, config or XARTaskConfig(), **parts)
        self.codes = None if self.tokenizer is None else code_table(self.tokenizer)

    def check_tokens(self, tokens: TokenFolder) -> None:
        """Raises ValueError: the tokens are not those the model was built for, or not as many in every image."""
        plan, model = tokens.plan, self.model
        width = plan.code_dim if self.codes is None else self.codes.shape[1]
        if tokens.codebook_size is not None and (self.codes is None or len(self.codes) != tokens.codebook_size):
            raise ValueError(f"the tokens are ids of {tokens.codebook_size} codes: xAR needs their tokenizer, for the codes' vectors")
        if width != model.code_dim:
            raise ValueError(f"the tokens have {width} channels, the generator was built for {model.code_dim}")
        if (tokens.layout.kind, plan.num_tokens) != (model.layout.kind, model.max_tokens):
            raise ValueError(f"the folder holds {plan.num_tokens} tokens of {tokens.layout}, the generator was built for {model.layout}")
        if int(tokens.counts.min()) < plan.num_tokens:
            raise ValueError(f"an image has {int(tokens.counts.min())} tokens; xAR needs all {plan.num_tokens} of each")

    def slots(self, batch: TokenBatch, generators: Sequence[torch.Generator]) -> Tensor:
        """What the network is to make, [B, S, C]: values or code vectors, normalised, in the model's order.

        generators: draw from posteriors, where the batch holds their deviations.
        """
        values = batch.values if batch.ids is None else self.codes.to(batch.ids.device)[batch.ids]
        if batch.deviations is not None:
            values = values + batch.deviations * rng.randn(values.shape[1:], generators, device=values.device)
        return self.model.order.pack(self.model.normalise(values.float()))

    def draw(self, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Noise [B, S, C] and times [B, E] of a batch."""
        order, device = self.model.order, self.model.device
        times = rng.randn((order.num_entities,), generators, device=device).sigmoid()
        return rng.randn((order.num_slots, self.model.code_dim), generators, device=device), times

    def thin(self, condition: Condition, generators: Sequence[torch.Generator]) -> tuple[Condition, Tensor | None]:
        """The condition without what is dropped, and dropout factors [L, 2, B, 1, D]."""
        config, model, device = self.config, self.model, self.model.device
        u = rng.rand((3,), generators, device=device)
        neither = u[:, 0] < config.condition_dropout
        alone = float(bool(model.settings.num_classes) and model.settings.text != "none")
        condition = condition.drop(neither | (u[:, 1] < alone * config.class_dropout), neither | (u[:, 2] < alone * config.caption_dropout))
        if not config.dropout:
            return condition, None
        keep = rng.rand((len(model.blocks), 2, 1, model.settings.width), generators, device=device) >= config.dropout
        return condition, keep.movedim(0, 2) / (1 - config.dropout)

    @torch.compiler.disable
    def prepare(self, batch: TokenBatch, generators: Sequence[torch.Generator]) -> tuple[Tensor, Condition, dict[str, Tensor | None]]:
        """Clean slots, a thinned condition, and what is drawn: all that is not the network."""
        condition, keep = self.thin(self.condition(batch), generators)
        noise, times = self.draw(generators)
        return self.slots(batch, generators), condition, dict(noise=noise, times=times, keep=keep)

    def forward(self, batch: TokenBatch, generators: Sequence[torch.Generator], step: int | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the velocity."""
        slots, condition, drawn = self.prepare(batch, generators)
        return self.model.denoising_loss(slots, condition, context=self.config.context, **drawn).mean(), {}

    @torch.no_grad()
    def held_out_loss(self, batch_size: int = 64, *, context: str | None = None) -> float:
        """Loss on held-out images with their full condition, noise and times drawn by image number. Raises ValueError: there are none.

        context: instead of the one it trains with.
        """
        total = num_images = 0
        for rows, batch in self.held_out_batches(batch_size):
            generators = rng.image_generators(0, rows)
            noise, times = self.draw(generators)
            how = dict(noise=noise, times=times, context=context or self.config.context)
            total += self.model.denoising_loss(self.slots(batch, generators), self.condition(batch), **how).sum().item()
            num_images += len(batch)
        return total / num_images

    @torch.no_grad()
    def preview(self, step: int) -> dict[str, Image.Image | float]:
        """The loss on held-out images, and samples under conditions spread over the training set, from the same noise each time."""
        numbers = {} if self.held_out is None else {"held_out_loss": self.held_out_loss()}
        if self.tokenizer is None:
            return numbers
        rows = spread_rows(len(self.dataset), self.config.preview_images)
        generators = rng.image_generators(0, len(rows))
        tokens, _ = generate_values(
            self.model,
            self.condition(read_batch(self.dataset, rows)),
            generators=generators,
            codes=self.codes,
            sampling=FlowSampling(num_steps=self.config.preview_steps, solver="euler"),
            guidance_scale=self.config.preview_guidance,
        )
        return {**numbers, "samples": make_grid(self.tokenizer.decode(tokens, generators=generators).float().cpu())}
