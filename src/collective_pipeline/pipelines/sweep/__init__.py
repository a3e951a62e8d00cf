"""Parameter efficiency over sizes and hyperparameters."""

from collective_pipeline.pipelines.sweep.pipeline import create_pipeline

__all__ = ["create_pipeline"]
