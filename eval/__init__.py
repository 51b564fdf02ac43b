"""Evaluation scripts: `python -m eval.reconstruction`, `python -m eval.generation`. What they compute lives in `vistok.metrics`."""
