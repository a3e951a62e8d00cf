"""A trained checkpoint's answers to a user's own images."""

from collective_pipeline.pipelines.predict.pipeline import create_pipeline

__all__ = ["create_pipeline"]
