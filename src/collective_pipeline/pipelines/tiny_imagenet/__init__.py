"""A plain residual network, and the same with each of the techniques that are said to help."""

from collective_pipeline.pipelines.tiny_imagenet.nodes import list_arms
from collective_pipeline.pipelines.tiny_imagenet.pipeline import ARMS, create_pipeline

__all__ = ["ARMS", "create_pipeline", "list_arms"]
