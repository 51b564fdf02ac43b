"""How well the next token can be told from those before it: one small GPT, the same for every tokenizer, for the same time.

    bits a token = -log2 p(token n | tokens < n), mean over held-out tokens;  bits an image = their sum
    told         = 1 - bits a token / bits a token of the unigram law         0: nothing can be told, whatever the size of the codebook

No classes, no captions; positions are learned for every layout, so that a grid has no advantage of geometry. The weights are those that
told a tenth of the training images best. B images, N tokens, K codes.
"""

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from vistok.generators import GPT, GPTConfig
from vistok.training.loop import seeded_build

SHAPE = dict(width=128, depth=3, num_heads=4, hidden=384)
BATCH, RATE, WARMUP, CHECKS = 32, 2e-3, 0.05, 5


@dataclass(frozen=True)
class Likelihood:
    """bits: [B] of each held-out image. counts: [B] its tokens. unigram: bits a token under the training tokens' own law. steps: taken."""

    bits: Tensor
    counts: Tensor
    unigram: float
    steps: int

    @property
    def bits_per_token(self) -> float:
        return float(self.bits.sum() / self.counts.sum())

    @property
    def bits_per_image(self) -> float:
        return float(self.bits.mean())

    @property
    def told(self) -> float:
        return 1 - self.bits_per_token / self.unigram

    def told_std(self, num_resamples: int = 1000) -> float:
        """Deviation of `told` over resampled held-out images."""
        B = len(self.bits)
        rows = torch.randint(B, (num_resamples, B), generator=torch.Generator().manual_seed(0))
        return float((self.bits[rows].sum(1) / self.counts[rows].sum(1) / self.unigram).std())


def measure_likelihood(
    train: Tensor, test: Tensor, *, codebook_size: int, seconds: float, seed: int, clock=time.process_time
) -> Likelihood:
    """Train for so many seconds of `clock` on ids [B, N] (-1 in the padding), then measure the held-out ids."""
    N = train.shape[1]
    config = GPTConfig(codebook_size=codebook_size, layout_kind="sequence", layout_shape=(N,), **SHAPE)
    model = seeded_build(lambda: GPT(config), seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train), generator=generator)
    kept, learned = order[: len(order) // 10], order[len(order) // 10 :]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.05)
    best, steps, checked, start = (math.inf, model.state_dict()), 0, 0, clock()
    with tqdm(total=round(seconds), desc="GPT", unit="s", leave=False) as bar:
        while (part := (clock() - start) / seconds) < 1:
            rows = learned[torch.randint(len(learned), (BATCH,), generator=generator)]
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, part / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * part))
            loss = token_bits(model.train(), train[rows]).sum() / (train[rows] >= 0).sum() * math.log(2)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            steps += 1
            bar.update(round(part * seconds) - bar.n)
            if part * CHECKS > checked + 1:
                checked += 1
                best = min(best, _checked(model, train[kept]), key=lambda pair: pair[0])
    model.load_state_dict(min(best, _checked(model, train[kept]), key=lambda pair: pair[0])[1])
    counts = torch.bincount(train[train >= 0], minlength=codebook_size).double() + 1
    tested = test[test >= 0]
    unigram = float(-(counts / counts.sum()).log2()[tested].mean())
    return Likelihood(_all_bits(model, test), (test >= 0).sum(1).double(), unigram, steps)


def token_bits(model: GPT, ids: Tensor) -> Tensor:
    """Bits of each token [B, N], 0 in the padding."""
    condition = model.make_condition(len(ids))
    logits = model(ids[:, :-1].clamp(min=0), condition)
    bits = F.cross_entropy(logits.float().transpose(1, 2), ids.clamp(min=0), reduction="none") / math.log(2)
    return bits * (ids >= 0)


@torch.no_grad()
def _all_bits(model: GPT, ids: Tensor) -> Tensor:
    return torch.cat([token_bits(model.eval(), part).sum(1) for part in ids.split(64)]).double()


def _checked(model: GPT, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
    return float(_all_bits(model, ids).mean()), {key: value.clone() for key, value in model.state_dict().items()}
