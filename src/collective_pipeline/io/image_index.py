"""The table of a tree of images as a catalog entry."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from kedro.io import AbstractDataset, DatasetError

from collective_pipeline.data.image_index import ImageIndex
from collective_pipeline.files import replacing

ABOUT = b"collective_pipeline.image_index"


class ImageIndexDataset(AbstractDataset[ImageIndex, ImageIndex | None]):
    """An index as Parquet, with what is known of it beside the table in the file's own metadata.

    Args:
        filepath: Of the file.
        optional: Whether nothing is loaded, rather than an error raised, where there is no file that can be read.
        metadata: For Kedro's plugins.
    """

    def __init__(self, *, filepath: str, optional: bool = False, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self._optional = optional
        self.metadata = metadata

    def load(self) -> ImageIndex | None:
        try:
            return _read(self._filepath)
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            if self._optional:
                return None
            raise DatasetError(f"{self._filepath} holds no index of images that can be read: {error}") from error

    def save(self, data: ImageIndex | None) -> None:
        assert data is not None
        about = {
            "root": str(data.root),
            "layout": data.layout,
            "class_names": data.class_names,
            "label_sources": data.label_sources,
            "problems": data.problems,
            "subset": data.subset,
            "digest": data.digest,
        }
        table = pa.Table.from_pandas(data.table, preserve_index=False)
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), ABOUT: json.dumps(about)})
        with replacing(self._filepath) as partial:
            pq.write_table(table, partial)

    def _exists(self) -> bool:
        return self._optional or self._filepath.exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix()}


def _read(path: Path) -> ImageIndex:
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[ABOUT])
    frame: pd.DataFrame = table.to_pandas()
    index = ImageIndex(
        Path(about["root"]),
        about["layout"],
        tuple(about["class_names"]),
        frame,
        about["label_sources"],
        {part: tuple(problems) for part, problems in about["problems"].items()},
        tuple(about["subset"]) if about["subset"] else None,
    )
    if index.digest != about["digest"]:
        raise ValueError("its digest is not that of its contents")
    return index
