"""Training: one loop for every task, with checkpoints that survive a kill and runs that resume bit by bit."""

from .config import TrainConfig
from .loop import seeded_build, train
from .task import TrainingTask

__all__ = ["TrainConfig", "TrainingTask", "seeded_build", "train"]
