"""A save that fails leaves the file of before, and nothing half-written."""

import json
from pathlib import Path, PurePosixPath

import pandas as pd
import plotly.graph_objects as go
import pytest

from collective_pipeline.io.atomic import CSVDataset, JSONDataset, ParquetDataset, PlotlyDataset, TextDataset

TABLE = pd.DataFrame({"a": [1, 2]})
CASES = [
    (CSVDataset, TABLE),
    (ParquetDataset, TABLE),
    (JSONDataset, {"a": 1}),
    (PlotlyDataset, go.Figure(go.Scatter(x=[1], y=[2]))),
    (TextDataset, "text"),
]


@pytest.mark.parametrize(("dataset", "data"), CASES)
def test_saves_as_the_dataset_itself(dataset, data, tmp_path):
    """What was saved is loaded again, and only the one file is there."""
    path = tmp_path / "folder" / "file"
    dataset(filepath=str(path)).save(data)

    assert [child.name for child in path.parent.iterdir()] == ["file"]
    assert dataset(filepath=str(path)).load() is not None


@pytest.mark.parametrize(("dataset", "data"), CASES)
def test_failed_rename_keeps_the_old_file(dataset, data, tmp_path, monkeypatch):
    """Full disk, pulled plug: the reader still finds the whole old file."""
    path = tmp_path / "file"
    path.write_text("old")

    def fail(self, target):
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(Exception, match="no room"):
            dataset(filepath=str(path)).save(data)

    assert path.read_text() == "old"
    assert [child.name for child in tmp_path.iterdir()] == ["file"]


def test_failed_write_keeps_the_old_file(tmp_path):
    """Data that cannot be written does not cost what was there."""
    path = tmp_path / "file.json"
    path.write_text(json.dumps({"old": 1}))
    dataset = JSONDataset(filepath=str(path))
    with pytest.raises(Exception, match="not JSON serializable"):
        dataset.save({"new": object()})

    assert dataset.load() == {"old": 1}
    assert dataset._filepath == PurePosixPath(path)
    assert [child.name for child in tmp_path.iterdir()] == ["file.json"]
