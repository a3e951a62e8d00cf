"""A catalog entry loads a data set by name, and says in one sentence why it cannot."""

from pathlib import Path

import pytest
from kedro.io import DataCatalog, DatasetError

from collective_pipeline.config import UserError
from collective_pipeline.io.images import ImagesDataset

MNIST = Path(__file__).parents[2] / "data" / "01_raw" / "mnist"


def test_a_catalog_entry_loads_the_images() -> None:
    entry = {
        "type": "collective_pipeline.io.images.ImagesDataset",
        "filepath": str(MNIST),
        "name": "mnist",
        "metadata": {"kedro-viz": {"layer": "raw"}},
    }
    raw = DataCatalog.from_config({"images": entry})["images"].load()

    assert (raw.name, len(raw.train), len(raw.test)) == ("mnist", 60_000, 10_000)


def test_an_unknown_name_is_reported_only_when_it_is_loaded() -> None:
    dataset = ImagesDataset(filepath=str(MNIST), name="minst")

    with pytest.raises(DatasetError, match=r"^dataset='minst' is unknown: did you mean 'mnist'\?") as caught:
        dataset.load()
    assert isinstance(caught.value.__cause__, UserError)


def test_a_bad_file_is_the_same_sentence_as_without_kedro(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"abcd")
    for file in ("train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / file).touch()

    with pytest.raises(DatasetError, match=f"^{tmp_path}/train-images-idx3-ubyte should hold idx images"):
        ImagesDataset(filepath=str(tmp_path), name="mnist").load()


def test_raw_data_is_not_written() -> None:
    with pytest.raises(DatasetError, match=r"^mnist is raw data, which is only read"):
        ImagesDataset(filepath=str(MNIST), name="mnist").save("anything")


def test_exists_says_whether_the_folder_is_there(tmp_path: Path) -> None:
    assert ImagesDataset(filepath=str(tmp_path), name="mnist").exists()
    assert not ImagesDataset(filepath=str(tmp_path / "absent"), name="mnist").exists()


def test_its_description_names_folder_and_data_set() -> None:
    description = str(ImagesDataset(filepath="raw/mnist", name="mnist"))

    assert "raw/mnist" in description
    assert "name='mnist'" in description
