"""Kedro's file datasets, written to a temporary file and renamed: a reader finds the old file or the new one."""

from pathlib import Path, PurePosixPath
from typing import Any

from kedro_datasets.json import JSONDataset as KedroJSONDataset
from kedro_datasets.pandas import CSVDataset as KedroCSVDataset
from kedro_datasets.pandas import ParquetDataset as KedroParquetDataset
from kedro_datasets.plotly import JSONDataset as KedroPlotlyDataset
from kedro_datasets.text import TextDataset as KedroTextDataset


class Atomic:
    """Mixed in before an unversioned local file dataset, whose own `save` then writes the temporary file."""

    _filepath: PurePosixPath

    def save(self, data: Any) -> None:
        final = Path(self._filepath)
        partial = final.with_name(f".partial.{final.name}")
        self._filepath = PurePosixPath(partial)
        try:
            super().save(data)  # type: ignore[misc]  # of the dataset that this is mixed into
            partial.replace(final)
        finally:
            self._filepath = PurePosixPath(final)
            partial.unlink(missing_ok=True)


class CSVDataset(Atomic, KedroCSVDataset):
    """A table as CSV."""


class ParquetDataset(Atomic, KedroParquetDataset):
    """A table as Parquet."""


class JSONDataset(Atomic, KedroJSONDataset):
    """Numbers and text as JSON."""


class PlotlyDataset(Atomic, KedroPlotlyDataset):
    """A plotly figure as JSON, which Kedro-Viz draws."""


class TextDataset(Atomic, KedroTextDataset):
    """Text, HTML included."""
