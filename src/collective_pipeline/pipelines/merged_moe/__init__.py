"""A mixture of experts, merged from networks that each know a group of classes, beside three networks of its size."""

from collective_pipeline.pipelines.merged_moe.nodes import estimate_params
from collective_pipeline.pipelines.merged_moe.pipeline import ARMS, COLLECTIVE, MIXTURE, create_pipeline

__all__ = ["ARMS", "COLLECTIVE", "MIXTURE", "create_pipeline", "estimate_params"]
