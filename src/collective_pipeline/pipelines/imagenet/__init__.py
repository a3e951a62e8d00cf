"""A residual network on image files of any size, on one GPU or several."""

from collective_pipeline.pipelines.imagenet.nodes import make_arm
from collective_pipeline.pipelines.imagenet.pipeline import ARM, create_pipeline

__all__ = ["ARM", "create_pipeline", "make_arm"]
