"""From the arms' results to the answer: tables, figures, report."""

from collective_pipeline.pipelines.comparison.pipeline import create_pipeline

__all__ = ["create_pipeline"]
