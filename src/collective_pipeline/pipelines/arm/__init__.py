"""One arm of a comparison: match its size, train it, evaluate it."""

from collective_pipeline.pipelines.arm.pipeline import create_pipeline, create_preparation, matched

__all__ = ["create_pipeline", "create_preparation", "matched"]
