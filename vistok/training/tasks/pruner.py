"""Train a learned pruner on a frozen vision-language model, on question scenes: answers stay right while few visual tokens stay; and
gates on a frozen vision transformer.

    loss = CE(answers of the softly pruned model) + a sum_l N_l / N l + b |mean_l N_l - N_target| + c sum_l max(0, floor N - N_l)

ATP-LLaVA (Ye et al. 2024, arXiv 2412.00447) has a = 0.05 and b = 0.2 and no floor: its budget can be met by emptying the last stages. The
language model is frozen. B pictures, L tokens of a sequence, N visual tokens, N_l what stage l leaves.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vistok.data.scenes import TEST, question_scene
from vistok.pruning.learned import DeleteGate, LearnedPruner, SoftLayers, budget_loss
from vistok.pruning.learned_vit import GatedTokens, SoftViT
from vistok.training.config import TrainConfig
from vistok.training.task import TrainingTask
from vistok.training.tasks.vlm import QuestionBatch, VLMTask, VLMTaskConfig


@dataclass(frozen=True, kw_only=True)
class PrunerTaskConfig:
    """The budget and its weights."""

    target: float = 0.25
    """Mean share of the visual tokens that the stages leave."""
    floor: float = 0.05
    """Share that every stage leaves at least."""
    late_weight: float = 0.05
    budget_weight: float = 0.2
    floor_weight: float = 0.2
    anneal_steps: int = 0
    """Steps in which the target falls from everything to `target`: while it is near 1, the answers say which tokens go first."""

    def __post_init__(self):
        if not 0 <= self.floor <= self.target <= 1 or self.target == 0:
            raise ValueError(f"floor={self.floor}, target={self.target} but 0 <= floor <= target <= 1 and target is not 0")
        if min(self.late_weight, self.budget_weight, self.floor_weight, self.anneal_steps) < 0:
            raise ValueError("weights of the budget and anneal_steps must not be negative")

    def target_at(self, step: int | Tensor) -> float | Tensor:
        """The share that is aimed at in a step."""
        left = 1 - step / self.anneal_steps if self.anneal_steps else 0.0
        return self.target + (1 - self.target) * (left.clamp(min=0) if isinstance(left, Tensor) else max(0.0, left))


class PrunerTask(TrainingTask):
    """Train `model`, a pruner, for the vision-language model `target` (with its `processor`), which stays as it is."""

    def __init__(self, model: LearnedPruner, target: nn.Module, config: PrunerTaskConfig, *, target_name: str):
        super().__init__()
        self.model, self.config, self.target_name = model, config, target_name
        self.scenes = VLMTask(target, target.processor, VLMTaskConfig()).requires_grad_(False).eval()

    def describe(self) -> dict:
        return {**super().describe(), "target": self.target_name}

    def on_start(self, dataset) -> None:
        self.scenes.dataset = dataset

    def make_loader(self, config: TrainConfig, start: int, rank: int, world_size: int):
        """Batches of scenes, as a vision-language model is trained on."""
        return self.scenes.make_loader(config, start, rank, world_size)

    def forward(self, batch: QuestionBatch, generators, step) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro batch; logs the share of tokens that each stage leaves, by the soft count. Gates draw their noise."""
        draws = generators if self.model.draws_noise else None
        with SoftLayers(self.scenes.model, self.model, answers=batch.targets >= 0, generators=draws) as soft:
            logits = self._logits(batch)
        wanted = batch.targets[:, 1:]
        is_asked = wanted >= 0
        wanted = wanted[is_asked]
        answers = F.cross_entropy(logits[is_asked], wanted)
        config = self.config
        target, layers = config.target_at(step), self.model.settings.layers
        terms = budget_loss(soft.kept, soft.num_visual, layers, target=target, floor=config.floor)
        loss = answers + config.late_weight * terms["late"] + config.budget_weight * terms["budget"] + config.floor_weight * terms["floor"]
        logs = {f"kept_{number}": (kept.sum(dim=1) / soft.num_visual).mean() for number, kept in enumerate(soft.kept)}
        logs |= {"answer_loss": answers, "answers": (logits[is_asked].argmax(dim=-1) == wanted).float().mean()}
        return loss, {name: value.detach() for name, value in logs.items()}

    def _logits(self, batch: QuestionBatch) -> Tensor:
        """[B, L-1, V]: of every token but the last, for the one after it."""
        is_token = (batch.ids != self.scenes.processor.tokenizer.pad_token_id).long()
        return self.scenes.model(input_ids=batch.ids, attention_mask=is_token, pixel_values=batch.images, use_cache=False).logits[:, :-1]

    @torch.no_grad()
    def preview(self, step: int) -> dict[str, Image.Image | float]:
        """Held-out answers (every word right), with tokens dropped for good and without pruning, and the share each stage leaves."""
        from vistok.pruning import prune

        device = next(self.model.parameters()).device
        batch = self.scenes.batch([question_scene(number, split=TEST, num_questions=1) for number in range(64)]).to(device)
        figures = {"held_out_unpruned": self._right(batch)}
        with prune(self.scenes.model, self.model) as pruned:
            figures["held_out_pruned"] = self._right(batch)
        report = pruned.stats()
        for number, kept in enumerate(report.num_kept):
            figures[f"held_out_kept_{number}"] = sum(kept) / sum(report.num_visual)
        return figures

    def _right(self, batch: QuestionBatch) -> float:
        """The share of answer words that are right."""
        target = batch.targets[:, 1:]
        is_asked = target >= 0
        return float((self._logits(batch)[is_asked].argmax(dim=-1) == target[is_asked]).float().mean())


@dataclass(frozen=True, kw_only=True)
class GateTaskConfig:
    """The budget of gates in a vision transformer and its weight."""

    target: float = 0.5
    """Share of the patches behind the last gate; each gate takes the same share of what reaches it."""
    budget_weight: float = 5.0

    def __post_init__(self):
        if not 0 < self.target <= 1 or self.budget_weight < 0:
            raise ValueError(f"target={self.target} is in (0, 1], budget_weight={self.budget_weight} not negative")


class GateTask(TrainingTask):
    """Train `model`, a delete gate, for a frozen image classifier of timm: its answers are the labels.

    loss = KL(classifier || softly gated classifier) + w mean_l (mean share kept by gate l - its share of the budget)^2
    """

    def __init__(self, model: DeleteGate, target: nn.Module, config: GateTaskConfig, *, target_name: str, held_out=None):
        super().__init__()
        self.model, self.config, self.target_name, self.held_out = model, config, target_name, held_out
        self.target = target.requires_grad_(False).eval()

    def describe(self) -> dict:
        return {**super().describe(), "target": self.target_name}

    def forward(self, batch, generators, step) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro batch; logs the share of patches behind each gate and how often the answer is the classifier's own."""
        with torch.no_grad():
            wanted = self.target(batch.images).log_softmax(dim=-1)
        with SoftViT(self.target, self.model) as soft:
            logits = self.target(batch.images).log_softmax(dim=-1)
        distance = F.kl_div(logits, wanted, log_target=True, reduction="batchmean")
        kept = torch.stack([mask.mean() for mask in soft.kept])
        shares = GatedTokens(gate=self.model, keep_ratio=self.config.target).shares()
        budget = (kept - torch.tensor(shares, device=kept.device)).square().mean()
        logs = {f"kept_{number}": share for number, share in enumerate(kept)}
        logs |= {"distance": distance, "agreement": (logits.argmax(dim=-1) == wanted.argmax(dim=-1)).float().mean()}
        return distance + self.config.budget_weight * budget, {name: value.detach() for name, value in logs.items()}

    @torch.no_grad()
    def preview(self, step: int) -> dict[str, Image.Image | float]:
        """On held-out images: how often the classifier still says the same with patches dropped, by the gate and evenly spaced."""
        from vistok.data import BatchLoader
        from vistok.pruning import prune

        if self.held_out is None:
            return {}
        batch = next(iter(BatchLoader(self.held_out, batch_size=min(128, len(self.held_out)), seed=0, flip=False)))
        images = batch.to(next(self.model.parameters()).device).images
        wanted, figures = self.target(images).argmax(dim=-1), {}
        gated = GatedTokens(gate=self.model, keep_ratio=self.config.target)
        for name, method, options in (("gate", gated, {}), ("uniform", "uniform", {"keep_ratio": self.config.target})):
            with prune(self.target, method, **options):
                figures[f"held_out_agreement_{name}"] = float((self.target(images).argmax(dim=-1) == wanted).float().mean())
        return figures
