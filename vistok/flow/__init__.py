"""Rectified flow: the path between images and noise, its solvers, and guidance."""

from vistok.flow.guidance import AdaptiveProjectedGuidance, classifier_free
from vistok.flow.path import interpolate, sample_times, velocity_target
from vistok.flow.solvers import SOLVERS, time_grid

__all__ = ["SOLVERS", "AdaptiveProjectedGuidance", "classifier_free", "interpolate", "sample_times", "time_grid", "velocity_target"]
