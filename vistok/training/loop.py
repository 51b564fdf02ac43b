"""The training loop: forward, backward, clip, step, average; and around it what lets a run be watched, stopped, killed and resumed.

Step s trains on the samples at positions [s B, (s + 1) B), B = batch_size. Order, augmentation and every random draw are functions of
(seed, position), so the state of a run is its tensors and one number, and neither the number of processes nor that of micro batches
changes what is computed.

    loss = sum over processes and micro batches of (images in it / B) * mean loss of it
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from vistok.rng import image_generators

from .checkpoint import newest_checkpoint, remove_leftovers, write_checkpoint
from .config import TrainConfig
from .ema import Ema
from .faults import StopSignal, explain_out_of_memory, not_finite_report
from .folder import export, open_run, store_config
from .schedule import learning_rate_factor
from .state import restore, snapshot, trained_parts
from .task import TrainingTask
from .trackers import Meters, RunLog, summarize

logger = logging.getLogger("vistok")
Built = TypeVar("Built")


def train(task: TrainingTask, dataset: Any, config: TrainConfig, resume: bool = False, recipe_name: str | None = None) -> Path:
    """Train a task on a data set and return the run folder; its `model/` holds the averaged weights.

    resume: continue from the newest complete checkpoint in `config.out`, bit for bit on one process.
    Ends early, but normally and saved, on SIGTERM or Ctrl-C.
    Raises ValueError: the folder holds a run and resume is False, or the run there was another one. FloatingPointError: NaN or infinite
    loss or gradient. MemoryError: says what to lower. OSError: a checkpoint could not be written twice; the last good one is kept.
    """
    threads = torch.get_num_threads()
    try:
        run = TrainingRun(task, dataset, config, resume, recipe_name)
        try:
            run.fit()
        finally:
            run.close()
    finally:
        torch.set_num_threads(threads)
    return config.out


def seeded_build(build: Callable[[], Built], seed: int) -> Built:
    """Call `build` with torch's random numbers seeded; the caller's own go on as if nothing had happened."""
    with _seeded(seed, torch.device("cpu")):
        return build()


class TrainingRun:
    """One run from its first or resumed step to its end."""

    def __init__(self, task: TrainingTask, dataset: Any, config: TrainConfig, resume: bool, recipe_name: str | None):
        self.task, self.dataset, self.config = task, dataset, config
        self.accelerator = Accelerator(
            cpu=not _has_accelerator() or None,  # without it accelerate ignores torchrun on a machine without a GPU: N runs in one folder
            mixed_precision="no",  # autocast and loss scaling are written out below
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=config.process_timeout)),
                DistributedDataParallelKwargs(find_unused_parameters=task.find_unused_parameters),
            ],
        )
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        if config.precision == "fp16" and self.device.type == "cpu":
            raise ValueError("precision='fp16' needs a GPU; use bf16 or no on a CPU")
        self.checkpoints = config.out / "checkpoints"
        description = {"recipe": recipe_name, "task": task.describe(), "data_digest": _digest(dataset)}
        open_run(config, description, resume)
        if self.is_main:
            remove_leftovers(self.checkpoints)
            remove_leftovers(config.out)
        self.accelerator.wait_for_everyone()

        task.to(self.device).train()
        task.dataset = dataset
        task.on_start(dataset)
        self.optimizer = build_optimizer(task, config)
        self.ema = Ema(task.model, config.ema_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.meters = Meters()
        self.parts = trained_parts(task)
        self.step = self.saved_step = self.bad_steps = 0
        self.is_saved = self.has_collapsed = False
        self.ahead: tuple[Any, list[torch.Generator]] | None = None
        if resume:
            self._restore()
        if config.compile:
            task.compile()
        self.module = self.accelerator.prepare_model(task)
        self.log: RunLog | None = None
        if self.is_main:
            self.log = RunLog(config.out, progress=config.progress, step=self.step, max_steps=config.max_steps)
            store_config(config, description)
        logger.info("%s at step %d of %d on %s", "resumed" if self.step else "started", self.step, config.max_steps, self._where())

    def fit(self) -> None:
        """Train to the last step or a signal, then save."""
        config = self.config
        loader = self.task.make_loader(
            config, self.step * config.batch_size, self.accelerator.process_index, self.accelerator.num_processes
        )
        batches = iter(loader)
        with StopSignal() as stop:
            while self.step < config.max_steps and not self._agreed(stop.requested):
                self.train_step(batches)
                self.step += 1
                if self.log:
                    self.log.tick(config.batch_size)
                if self.step % config.log_every == 0 or self.step == config.max_steps:
                    self.write_line()
                if config.preview_every and (self.step % config.preview_every == 0 or self.step == config.max_steps):
                    self.write_previews()
                if self.step % config.save_every == 0:
                    self.save()
            if self.step < config.max_steps:
                logger.warning("stopped by a signal at step %d; continue with --resume", self.step)
            self.save()

    def train_step(self, batches: Iterator[Any]) -> None:
        """One optimizer step: `gradient_accumulation` micro batches, one clipped AdamW step, one step of the average."""
        config = self.config
        self.is_saved = False
        self.optimizer.zero_grad(set_to_none=True)
        self._set_learning_rate()
        seen = []
        with explain_out_of_memory(self.step, config.micro_batch_size // self.accelerator.num_processes, self.device):
            for index in range(config.gradient_accumulation):
                batch, generators = self.ahead or self._fetch(batches)
                self.ahead = None
                is_last = index == config.gradient_accumulation - 1
                with nullcontext() if is_last else self.accelerator.no_sync(self.module):
                    loss, logs = self.forward(batch, generators)
                    weight = len(batch) * self.accelerator.num_processes / config.batch_size  # DDP takes the mean over processes
                    # a loss that is no number makes all gradients NaN, on every process, so that all of them see it
                    self.scaler.scale(loss * weight * torch.where(loss.detach().isfinite(), 1.0, math.nan)).backward()
                seen.append((batch, {"loss": loss.detach(), **logs}))
            if self.step + 1 < config.max_steps:
                self.ahead = self._fetch(batches)  # while the GPU still works on what was queued above
        self.scaler.unscale_(self.optimizer)
        norms = self.gradient_norms()
        if torch.stack(list(norms.values())).isfinite().all():
            self.clip(norms)
            self.scaler.step(self.optimizer)
            self.ema.update(self.step)
            for batch, logs in seen:
                self.meters.add({**logs, **{_norm_name(part): norm for part, norm in norms.items()}}, len(batch))
        else:
            self._leave_out(seen)
        self.scaler.update()

    def forward(self, batch: Any, generators: list[torch.Generator]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and logs of one micro batch; layers with random numbers of their own (dropout) are seeded by its first position."""
        step = torch.tensor(self.step, device=self.device) if self.config.compile else self.step  # a number would be compiled in
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.config.precision)
        with _seeded(generators[0].initial_seed(), self.device), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            loss, logs = self.module(batch, generators, step)
        return loss.float(), logs

    def gradient_norms(self) -> dict[str, Tensor]:
        """Norm of the gradients of each trained part; 0 for a part that took no part in this step."""
        norms = {}
        for part, parameters in self.parts.items():
            gradients = [p.grad for p in parameters if p.grad is not None]
            norms[part] = (
                torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))) if gradients else torch.zeros((), device=self.device)
            )
        return norms

    def clip(self, norms: dict[str, Tensor]) -> None:
        """Scale each part's gradients down to clip_norm, by its own norm: a discriminator does not shrink its generator's step."""
        if self.config.clip_norm:
            for part, norm in norms.items():
                gradients = [p.grad for p in self.parts[part] if p.grad is not None]
                if gradients:
                    torch._foreach_mul_(gradients, (self.config.clip_norm / (norm + 1e-6)).clamp(max=1.0))

    def write_line(self) -> None:
        """One line of metrics over the steps since the last one, over all processes."""
        sums, self.meters = self._reduced_meters(), Meters()
        if self.log and sums:
            values = summarize(sums)
            self.log.line(self.step, {**values, "lr": self.optimizer.param_groups[0]["lr"]})
            self._warn_of_collapse(values)

    @torch.no_grad()
    def write_previews(self) -> None:
        """Pictures made with the averaged weights, by the main process."""
        if self.log:
            self.task.eval()
            with self.log.paused(), self.ema.in_place(), _seeded(self.config.seed, self.device):
                self.log.preview(self.step, self.task.preview(self.step))
            self.task.train()

    def save(self) -> None:
        """Write checkpoint and model. A failed write is tried once more; then all processes stop with the error."""
        if self.is_saved:
            return
        meters, reasons = self._reduced_meters(), self._bad_images()
        problem = [None]
        if self.log:
            try:
                with self.log.paused():
                    self._twice(lambda: self._write_checkpoint(meters))
                    self._twice(lambda: export(self.task, self.ema, self.config.out / "model"))
                    self._twice(lambda: self.log.bad_images(reasons))
            except OSError as error:
                last = f"the last good checkpoint is that of step {self.saved_step}" if self.saved_step else "there is no checkpoint yet"
                problem = [f"stopped at step {self.step}: {error}; {last}"]
                logger.error("%s", problem[0])
        if self.accelerator.num_processes > 1:
            broadcast_object_list(problem)
        if problem[0]:
            raise OSError(problem[0])
        self.is_saved = True

    def close(self) -> None:
        """Close the run's files and free the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.log:
            self.log.close()

    def _fetch(self, batches: Iterator[Any]) -> tuple[Any, list[torch.Generator]]:
        batch = next(batches)
        generators = image_generators(self.config.seed, batch.positions.tolist(), self.device)
        return batch.to(self.device), generators

    def _write_checkpoint(self, meters: dict[str, Tensor]) -> None:
        state = {
            "samples_seen": self.step * self.config.batch_size,
            "bad_steps": self.bad_steps,
            "scaler": self.scaler.state_dict(),
        }
        files = snapshot(self.task, self.optimizer, self.ema, meters)
        write_checkpoint(self.checkpoints, self.step, files, state, keep=self.config.keep_checkpoints)
        self.saved_step = self.step

    def _twice(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            logger.error("%s; trying once more", error)
            write()

    def _restore(self) -> None:
        found = newest_checkpoint(self.checkpoints)
        if found is None:
            logger.warning("no complete checkpoint in %s: starting at step 0", self.checkpoints)
            return
        files, state = found
        restore(files, self.task, self.optimizer, self.ema)
        self.step = self.saved_step = state["step"]
        self.bad_steps = state["bad_steps"]
        self.is_saved = (self.config.out / "model").exists()
        self.scaler.load_state_dict(state["scaler"])
        for name, total in files["meters"].items():  # the stored sums are those of all processes: one of them carries them on
            own = total if self.is_main else torch.zeros_like(total)
            self.meters.sums[name] = own if name == "images" else own.to(self.device)

    def _set_learning_rate(self) -> None:
        factor = learning_rate_factor(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def _leave_out(self, seen: list[tuple[Any, dict[str, Tensor]]]) -> None:
        is_lost = any(not logs["loss"].isfinite() for _, logs in seen)
        if self.scaler.is_enabled() and self.scaler.get_scale() > 1 and not self._agreed(is_lost):
            self.scaler.step(self.optimizer)  # an overflow of fp16: it leaves the step out, and update() lowers the scale
            return
        names = getattr(self.dataset, "names", None)
        reports = [not_finite_report(batch, names, logs, self.task) for batch, logs in seen]
        if self.accelerator.num_processes > 1:
            reports = gather_object(reports)
        causes = [text for is_loss, text in reports if is_loss] or [text for _, text in reports if text]  # a lost loss spoils all gradients
        report = "; ".join(causes) or "each gradient is finite, but their norm overflows"
        self.bad_steps += 1
        message = f"NaN or infinite numbers at step {self.step}: {report}"
        if self.bad_steps > self.config.max_bad_steps:
            logger.error("%s", message)
            raise FloatingPointError(f"{message}. {self.bad_steps} such steps, max_bad_steps={self.config.max_bad_steps} are allowed")
        logger.warning("%s; step left out (%d of %d)", message, self.bad_steps, self.config.max_bad_steps)

    def _reduced_meters(self) -> dict[str, Tensor]:
        sums = dict(self.meters.sums)
        if self.accelerator.num_processes > 1:
            return {name: self.accelerator.reduce(sums[name].to(self.device), "sum").cpu() for name in sorted(sums)}
        return sums

    def _bad_images(self) -> dict[str, str]:
        found = getattr(self.dataset, "bad_images", None)
        reasons = dict(found.reasons) if found else {}
        if self.accelerator.num_processes > 1:
            reasons = {name: reason for part in gather_object([reasons]) for name, reason in part.items()}
        return reasons

    def _agreed(self, requested: bool) -> bool:
        """Whether any process was asked to stop; all must leave the loop at the same step."""
        if self.accelerator.num_processes == 1:
            return requested
        return bool(self.accelerator.reduce(torch.tensor(float(requested), device=self.device), "sum") > 0)

    def _warn_of_collapse(self, values: dict[str, float]) -> None:
        size = getattr(self.task, "codebook_size", None) or 0
        lowest = min((value for name, value in values.items() if name.endswith("perplexity")), default=math.inf)
        was, self.has_collapsed = self.has_collapsed, self.step > self.config.warmup_steps and lowest < 0.1 * size
        if self.has_collapsed and not was:
            logger.warning("step %d: codebook perplexity %.1f is below 10 %% of its %d codes", self.step, lowest, size)

    def _where(self) -> str:
        return f"{self.device.type}, {self.accelerator.num_processes} process{'es' if self.accelerator.num_processes > 1 else ''}"


def build_optimizer(task: TrainingTask, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the task's groups; `peak_lr` of each group is what the schedule scales."""
    groups = [{**group, "peak_lr": group.get("lr", config.learning_rate)} for group in task.parameter_groups()]
    trained = {id(p) for p in task.parameters() if p.requires_grad}
    listed = {id(p) for group in groups for p in group["params"]}
    if not trained or listed != trained:
        raise ValueError(f"parameter_groups() lists {len(listed)} parameters, but {len(trained)} of the task are trained")
    fused = True if next(task.parameters()).device.type in ("cpu", "cuda") else None
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=fused)


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()


def _norm_name(part: str) -> str:
    return "grad_norm" if part == "model" else f"grad_norm_{part}"


def _digest(dataset: Any) -> str:
    """Changes with the names of the images and their order."""
    names = getattr(dataset, "names", None)
    return hashlib.sha256("\n".join(map(str, names or [len(dataset)])).encode("utf-8", "surrogateescape")).hexdigest()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's own random numbers, seeded within the block and given back as they were."""
    on_device = device.type in ("cuda", "xpu")
    with torch.random.fork_rng([device] if on_device else [], device_type=device.type if on_device else "cuda"):
        torch.default_generator.manual_seed(seed)
        if on_device:
            torch.get_device_module(device).manual_seed(seed)
        yield
