"""Kedro's file datasets, replaced as a whole: a reader finds the old file or the new one."""

from pathlib import Path, PurePosixPath
from typing import Any

from kedro_datasets.json import JSONDataset as KedroJSONDataset
from kedro_datasets.pandas import CSVDataset as KedroCSVDataset
from kedro_datasets.pandas import ParquetDataset as KedroParquetDataset
from kedro_datasets.plotly import JSONDataset as KedroPlotlyDataset
from kedro_datasets.text import TextDataset as KedroTextDataset

from collective_pipeline.files import replacing


class Atomic:
    """Mixed in before an unversioned local file dataset, whose own `save` then writes the temporary file."""

    _filepath: PurePosixPath

    def save(self, data: Any) -> None:
        final = self._filepath
        try:
            with replacing(Path(final)) as partial:
                self._filepath = PurePosixPath(partial)
                super().save(data)  # type: ignore[misc]  # of the dataset that this is mixed into
        finally:
            self._filepath = final


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
