"""A learning rate for an experiment: its first arm's loss at ever higher ones."""

from collective_pipeline.pipelines.lr_finder.pipeline import create_pipeline

__all__ = ["create_pipeline"]
