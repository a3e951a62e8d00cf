"""Networks with gated channels beside those without."""

from collective_pipeline.pipelines.deepmoe.nodes import list_arms, make_arms

__all__ = ["list_arms", "make_arms"]
