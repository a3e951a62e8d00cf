"""A page that says what a trained checkpoint makes of an image."""

from collective_pipeline.pipelines.demo.pipeline import create_pipeline

__all__ = ["create_pipeline"]
