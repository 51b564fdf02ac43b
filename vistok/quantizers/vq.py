"""Vector quantization: each vector becomes the nearest row of a learned codebook.

van den Oord et al. 2017, arXiv 1711.00937 (equations 1-3, appendix A.1). n, e: as they come, or as unit vectors under the cosine metric.

    id    = argmin_k |n - e_k|^2                                  the lowest of equals
    codes = n + sg(e_id - n)                                      straight-through, or
    codes = (|e_id| / |n|) R n                                    rotation trick: R turns n onto e_id and is held fixed,
                                                                  Fifty et al. 2024, arXiv 2410.06424, section 4
    loss  = codebook_weight mean (e_id - sg n)^2                  codebooks that learn by gradient
          + commitment_weight mean (n - sg e_id)^2
          + entropy_weight (mean H(p) - H(mean p))                entropy.py
          + orthogonal_weight (|E^T E|_F^2 / K^2 - 1 / K)         = mean_jk (e_j . e_k)^2 - 1/K over unit rows, from a d x d matrix;
                                                                  Shin et al. 2021, arXiv 2112.00384
    update="linear" (SimVQ, Zhu et al. 2024, arXiv 2411.02038): e_k = c_k W, C stays as drawn, W learns

How the codebook moves in training, over the vectors of all processes:

    start    k-means over the first batch, seeded with its vectors
    average  counts = g counts + (1-g) n_k;  sums = g sums + (1-g) sum of the vectors whose code is k         g: ema_decay
             e_k = sums / smoothed counts;  smoothed = (counts + eps) / (total + K eps) total
    revival  a code idle for `revive_after` steps takes a random vector of the batch

N vectors of width d, K codes, E the K x d codebook. Everything is computed in float32, outside autocast, and the codebook stays float32
when the model is cast to half precision.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.quantizers.base import QuantizerOutput, check_range
from vistok.quantizers.entropy import assignment_entropies
from vistok.quantizers.groups import METRICS, CodeGroup, normalize_groups, weigh_groups
from vistok.quantizers.lookup import nearest_codes
from vistok.quantizers.sync import draw_vectors, sum_over_processes

UPDATES = ("gradient", "ema", "linear", "frozen")
TRAINING_STATE = frozenset({"ema_counts", "ema_sums", "started", "idle", "steps"})
"""Buffers of a VQ that only its training reads; official formats have no place for them."""


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """Shape and training of a codebook."""

    codebook_size: int = 8192
    """K."""
    code_dim: int = 32
    """d."""
    metric: Literal["euclidean", "cosine"] = "euclidean"
    """"cosine" compares unit vectors."""
    unit_codes: bool = True
    """Under the cosine metric: also return unit vectors and take the losses between them. False: the rows as stored (VAR)."""
    groups: tuple[CodeGroup, ...] = ()
    """Slices that share the index, each with its weight and metric; code_dim must be their sum. Empty: one group of `metric`."""
    update: Literal["gradient", "ema", "linear", "frozen"] = "gradient"
    """Who moves the codes: the optimizer, a moving average of the vectors, the optimizer through one linear map (SimVQ), or nobody."""
    gradient: Literal["straight-through", "rotation"] = "straight-through"
    """How the gradient of the codes reaches the vectors."""
    commitment_weight: float = 0.25
    """Weight of the pull of the vectors to their codes."""
    codebook_weight: float = 1.0
    """Weight of the pull of the codes to their vectors (update="gradient" or "linear")."""
    entropy_weight: float = 0.0
    """Weight of the entropy term: each vector sure of its code, all codes used alike. 0 leaves it out, and its time with it."""
    entropy_temperature: float = 0.01
    """Temperature of the soft assignments in the entropy term."""
    orthogonal_weight: float = 0.0
    """Weight of the term that keeps codes apart in direction (update="gradient" or "linear")."""
    ema_decay: float = 0.99
    """Share of the past in the moving average (update="ema")."""
    ema_eps: float = 1e-5
    """Laplace smoothing of the moving average's counts."""
    kmeans_iterations: int = 0
    """Rounds of k-means over the first training batch that place the codes; 0: they start random."""
    revive_after: int = 0
    """A code that no vector chose in this many training steps takes a random vector of the batch; 0: never."""

    def __post_init__(self):
        if self.codebook_size < 1 or self.code_dim < 1:
            raise ValueError(f"codebook_size={self.codebook_size} and code_dim={self.code_dim} must be positive")
        if self.metric not in METRICS or self.update not in UPDATES or self.gradient not in ("straight-through", "rotation"):
            raise ValueError(
                f"metric={self.metric!r} must be one of {METRICS}, update={self.update!r} one of {UPDATES}, "
                f"gradient={self.gradient!r} 'straight-through' or 'rotation'"
            )
        if self.groups and sum(group.dim for group in self.groups) != self.code_dim:
            raise ValueError(f"code_dim {self.code_dim} is not the sum of the groups' {[group.dim for group in self.groups]}")
        if self.update in ("linear", "frozen") and (self.kmeans_iterations or self.revive_after):
            raise ValueError(f"update={self.update!r} keeps its codebook: set kmeans_iterations and revive_after to 0")
        if not 0 <= self.ema_decay < 1 or self.entropy_temperature <= 0:
            raise ValueError(f"ema_decay={self.ema_decay} must be in [0, 1), entropy_temperature={self.entropy_temperature} positive")


class VQ(nn.Module):
    """A codebook of K vectors, `codebook` [K, d]: a parameter (update="gradient") or a buffer.

    State beside it, only where the config asks for it: `projection` [d, d] (linear), `ema_counts` [K] and `ema_sums` [K, d] (ema),
    `started` (k-means), `idle` [K] and `steps` (revival).
    """

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.groups = groups = config.groups or (CodeGroup(dim=config.code_dim, metric=config.metric),)
        self.codebook_size, self.code_dim = K, d = config.codebook_size, config.code_dim
        if config.update == "linear":  # SimVQ: the drawn codes need spread, for the map turns them all at once
            codebook = torch.randn(K, d) * d**-0.5
            self.projection = nn.Parameter(torch.eye(d))
        else:
            codebook = torch.empty(K, d).uniform_(-1 / K, 1 / K)
        codebook = normalize_groups(codebook, groups)
        if config.update == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        if config.update == "ema":
            self.register_buffer("ema_counts", torch.ones(K))
            self.register_buffer("ema_sums", codebook.clone())
        if config.kmeans_iterations:
            self.register_buffer("started", torch.tensor(False))
        if config.revive_after:
            self.register_buffer("idle", torch.zeros(K, dtype=torch.int64))
            self.register_buffer("steps", torch.tensor(0))
        self._hits: Tensor | None = None  # not state: a count since the last reset

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize, and in training mode let the codebook follow (`observe`).

        z: [..., d] float. Returns codes [..., d] in z.dtype, ids [...] int64, loss (float32 scalar) and its terms.
        """
        if self.training:
            self.start(z)
        out = self.quantize(z)
        if self.training:
            self.observe(z, out.ids)
        return out

    def quantize(self, z: Tensor) -> QuantizerOutput:
        """Codes and ids of vectors z [..., d] as in forward, but the codebook stays as it is, in training mode too."""
        with torch.autocast(z.device.type, enabled=False):
            n = self.place(z)
            ids = self.nearest(z)
            picked = self.decode(ids)
            terms = self.loss_terms(n, picked)
            codes = turn(n, picked) if self.config.gradient == "rotation" else n + (picked - n).detach()
        return QuantizerOutput(codes=codes.to(z.dtype), ids=ids, loss=sum(terms.values()), terms=terms)

    def loss_terms(self, n: Tensor, picked: Tensor) -> dict[str, Tensor]:
        """The weighted terms of the loss for placed vectors n [..., d] and their codes picked [..., d]."""
        config = self.config
        terms = {"commitment": config.commitment_weight * F.mse_loss(n, picked.detach())}
        finite = n.detach().isfinite().all(-1, keepdim=True)
        if config.update in ("gradient", "linear"):
            # a NaN vector makes the loss NaN through the commitment, which the trainer sees, but puts no NaN into the codebook's gradient
            target = torch.where(finite, n.detach(), picked.detach())
            terms["codebook"] = config.codebook_weight * F.mse_loss(picked, target)
        if config.entropy_weight or config.orthogonal_weight:
            codes = self.vectors()
        if config.entropy_weight:
            keys = weigh_groups(normalize_groups(torch.where(finite, n, 0), self.groups), self.groups).flatten(0, -2)
            table = weigh_groups(normalize_groups(codes, self.groups), self.groups)
            certain, even = assignment_entropies(keys, table, temperature=config.entropy_temperature)
            terms["entropy"] = config.entropy_weight * (certain - even)
        if config.orthogonal_weight:
            unit = F.normalize(codes, dim=-1)
            terms["orthogonal"] = config.orthogonal_weight * (
                (unit.t() @ unit).square().mean() * (self.code_dim / len(unit)) ** 2 - 1 / len(unit)
            )
        return terms

    @torch.no_grad()
    def nearest(self, z: Tensor, *, k: int | None = None) -> Tensor:
        """Ids [...] int64 of the codes nearest to z [..., d]; [..., k] of the k nearest, nearest first, where k is given.

        A NaN vector gets some id of the codebook and leaves its neighbours alone.
        """
        with torch.autocast(z.device.type, enabled=False):
            keys = weigh_groups(normalize_groups(z.float(), self.groups), self.groups)
            return nearest_codes(keys, weigh_groups(normalize_groups(self.vectors(), self.groups), self.groups), k=k)

    def decode(self, ids: Tensor) -> Tensor:
        """Codes [..., d] float32 of ids [...]; gradients reach the chosen rows only.

        Raises ValueError (on a CPU; on an accelerator the lookup itself fails): an id is outside [0, K).
        """
        if ids.device.type == "cpu":
            check_range(ids, self.codebook_size)
        return self._mapped(F.embedding(ids, self.codebook))

    def vectors(self) -> Tensor:
        """All codes [K, d] float32, as decode returns them."""
        # a copy, because graphs keep it while training moves the codebook in place
        return self._mapped(self.codebook.clone() if self.training else self.codebook)

    def place(self, z: Tensor) -> Tensor:
        """Vectors [..., d] where codes live: float32, cosine slices of unit length unless unit_codes is False."""
        return normalize_groups(z.float(), self.groups) if self.config.unit_codes else z.float()

    def _mapped(self, rows: Tensor) -> Tensor:
        """Stored rows [..., d] as codes."""
        return self.place(rows.float() @ self.projection if self.config.update == "linear" else rows)

    @torch.no_grad()
    def set_codebook(self, codebook: Tensor) -> None:
        """Put codes [K, d] in place, as a start of further training or of none."""
        if codebook.shape != self.codebook.shape:
            raise ValueError(f"the codebook is {tuple(self.codebook.shape)}, got {tuple(codebook.shape)}")
        self.codebook.copy_(codebook)
        if self.config.update == "ema":
            self.ema_counts.fill_(1)
            self.ema_sums.copy_(codebook)
        if self.config.kmeans_iterations:
            self.started.fill_(True)

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        """Place the codes by k-means over vectors z [B, ..., d] of all processes, once in the codebook's life."""
        if not self.config.kmeans_iterations or bool(self.started):
            return
        vectors = self.place(z)
        centres = self._first_centres(vectors)
        flat = vectors.reshape(-1, self.code_dim)
        for _ in range(self.config.kmeans_iterations):
            counts, sums = self._sums(flat, nearest_codes(flat, centres))
            means = normalize_groups(sums / counts.clamp_min(1)[:, None], self.groups if self.config.unit_codes else ())
            centres = torch.where(counts[:, None] > 0, means, centres)
        self.set_codebook(centres)

    def _first_centres(self, vectors: Tensor) -> Tensor:
        """K random vectors of the batch; where it has fewer, they repeat with a little noise, so that each can move on its own."""
        drawn = draw_vectors(vectors, self.codebook_size, seed=0)
        if not len(drawn):
            raise FloatingPointError("no vector of the first training batch is finite: the codebook cannot be started from it")
        repeats = torch.arange(self.codebook_size, device=drawn.device) % len(drawn)
        noise = torch.randn(drawn[repeats].shape, generator=torch.Generator().manual_seed(0)).to(drawn.device)
        scale = 0.01 * drawn.std(0, correction=0)
        again = torch.arange(self.codebook_size, device=drawn.device) >= len(drawn)
        return self.place(drawn[repeats] + noise * scale * again[:, None])

    @torch.no_grad()
    def observe(self, z: Tensor, ids: Tensor) -> None:
        """Let the codebook follow the vectors z [B, ..., d] and their ids [B, ...] of one training step: average, revive, count.

        Every process has to call it equally often. Vectors with a NaN or infinite entry change nothing.
        """
        config = self.config
        with torch.autocast(z.device.type, enabled=False):
            vectors = self.place(z.detach())
            flat = vectors.reshape(-1, self.code_dim)
            if config.update == "ema":
                counts, sums = self._sums(flat, ids.flatten())
                self._average(counts, sums)
            else:
                counts = self._counts(flat, ids.flatten())
                counts = counts if config.update == "frozen" else sum_over_processes(counts)[0]
            self._hits = counts.long() if self._hits is None else self._hits.to(counts.device) + counts.long()
            if config.revive_after:
                self.steps += 1
                self.idle.copy_(torch.where(counts > 0, 0, self.idle + 1))
                self._revive_idle(vectors)

    def _counts(self, flat: Tensor, ids: Tensor) -> Tensor:
        return torch.bincount(ids[flat.isfinite().all(1)], minlength=self.codebook_size).float()

    def _sums(self, flat: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """How many finite vectors have each code, [K] float32, and their sums [K, d], over all processes."""
        finite = flat.isfinite().all(1)
        flat, ids = flat[finite], ids[finite]
        counts = torch.bincount(ids, minlength=self.codebook_size).float()
        return tuple(sum_over_processes(counts, flat.new_zeros(self.codebook_size, self.code_dim).index_add_(0, ids, flat)))

    def _average(self, counts: Tensor, sums: Tensor) -> None:
        """The moving average's step."""
        config = self.config
        self.ema_counts.lerp_(counts, 1 - config.ema_decay)
        self.ema_sums.lerp_(sums, 1 - config.ema_decay)
        total = self.ema_counts.sum()
        smoothed = (self.ema_counts + config.ema_eps) / (total + self.codebook_size * config.ema_eps) * total
        self.codebook.copy_(self.place(self.ema_sums / smoothed[:, None]))

    def _revive_idle(self, vectors: Tensor) -> None:
        """Give codes that have been idle for long random vectors of the batch, as far as these go."""
        idle = (self.idle >= self.config.revive_after).nonzero()[:, 0]  # waits for the device: the draw's size depends on it
        if not len(idle):
            return
        drawn = draw_vectors(vectors, len(idle), seed=int(self.steps))
        idle = idle[: len(drawn)]
        self.codebook[idle] = drawn.to(self.codebook.dtype)
        self.idle[idle] = 0
        if self.config.update == "ema":
            self.ema_counts[idle] = 1
            self.ema_sums[idle] = drawn

    def codebook_usage(self) -> dict[str, float]:
        """`usage`, the share of codes chosen at least once, and `perplexity`, exp of the choices' entropy, 1 to K.

        Over the training vectors of all processes since the last `reset_usage`; 0 before the first.
        """
        if self._hits is None:
            return {"usage": 0.0, "perplexity": 0.0}
        p = self._hits[self._hits > 0].double() / self._hits.sum().clamp_min(1)
        return {"usage": len(p) / self.codebook_size, "perplexity": float((-(p * p.log()).sum()).exp()) if len(p) else 0.0}

    def reset_usage(self) -> None:
        """Start counting anew."""
        self._hits = None

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        """Move with the model, but stay float32 where the model is cast to half precision: rounding rows to 8 bits merges codes."""

        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            halved = tensor.dtype == torch.float32 and moved.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(moved.device) if halved else moved

        return super()._apply(keep_float32, recurse)


def turn(n: Tensor, picked: Tensor) -> Tensor:
    """The codes picked [..., d], whose gradient turns and stretches back onto n [..., d] (rotation trick).

    R = I - 2 r r^T + 2 q e^T with e = n/|n|, q = picked/|picked|, r = (e + q)/|e + q|, the reflection form of the paper's equation 4.
    """
    with torch.no_grad():
        e, q = F.normalize(n, dim=-1), F.normalize(picked, dim=-1)
        r = F.normalize(e + q, dim=-1)
        stretch = picked.norm(dim=-1, keepdim=True) / n.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    turned = stretch * (n - 2 * (n * r).sum(-1, keepdim=True) * r + 2 * (n * e).sum(-1, keepdim=True) * q)
    return turned + (picked - turned).detach()  # equal but for rounding; ids must decode to exactly these codes
