"""What comparing arms promises beside its tables."""

import io

import pandas as pd

from collective_pipeline.config import PHASE1
from collective_pipeline.evaluation.comparison import RUN_COLUMNS
from collective_pipeline.evaluation.gpu import GPU_COLUMNS
from collective_pipeline.evaluation.results import OF_CLASS
from collective_pipeline.pipelines.comparison.nodes import compare


def test_a_thousand_classes_are_compared_without_a_warning():
    """Of tables as they come from their files; warnings are errors here."""
    row = dict.fromkeys((*RUN_COLUMNS, *GPU_COLUMNS, "test_top5_accuracy"), 1.0) | {
        f"{OF_CLASS}{k}": float(k) for k in range(1000)
    }
    tables = [
        pd.read_csv(io.StringIO(pd.DataFrame([row | {"model_type": arm, "diverged": False}]).to_csv(index=False)))
        for arm in ("collective", "shallow")
    ]
    runs, comparison, summary = compare(PHASE1, {"collective": 1.0, "shallow": 2.0}, *tables)

    assert tuple(runs) == RUN_COLUMNS and list(comparison["latency_ms"]) == [1, 2]
    assert summary["test_top5_accuracy"] == {"collective": 1, "shallow": 1}
