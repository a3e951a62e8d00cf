"""One arm of a comparison: match its size, train it, evaluate it."""

from collective_pipeline.pipelines.arm.pipeline import create_gate, create_pipeline

__all__ = ["create_gate", "create_pipeline"]
