"""An index is the same after it was written and read."""

import pandas as pd
import pytest
from kedro.io import DatasetError
from tests.data.test_image_index import ilsvrc, write_solution

from collective_pipeline.data.image_index import index_images
from collective_pipeline.io.image_index import ImageIndexDataset

__all__ = ["ilsvrc"]


def test_an_index_comes_back_as_it_was(ilsvrc, tmp_path):
    write_solution(ilsvrc)
    index = index_images(ilsvrc)
    dataset = ImageIndexDataset(filepath=str(tmp_path / "new" / "index.parquet"))
    dataset.save(index)
    loaded = dataset.load()

    pd.testing.assert_frame_equal(loaded.table, index.table)
    assert (loaded.root, loaded.class_names, loaded.digest) == (index.root, index.class_names, index.digest)
    assert loaded.describe().equals(index.describe())


def test_where_there_is_none_nothing_is_known_or_it_is_an_error(tmp_path):
    file = tmp_path / "index.parquet"
    assert ImageIndexDataset(filepath=str(file), optional=True).load() is None
    with pytest.raises(DatasetError, match="holds no index of images"):
        ImageIndexDataset(filepath=str(file)).load()
    file.write_bytes(b"no table")
    assert ImageIndexDataset(filepath=str(file), optional=True).load() is None
