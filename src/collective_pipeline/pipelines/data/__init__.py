"""From raw images and parameters to what every arm shares."""

from collective_pipeline.pipelines.data.pipeline import create_pipeline, create_reader

__all__ = ["create_pipeline", "create_reader"]
