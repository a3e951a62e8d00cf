"""What the report promises: the answer first, one file, nothing fetched, nothing unescaped."""

import io
import itertools
from html.parser import HTMLParser
from itertools import pairwise
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
import torch
from plotly.offline import get_plotlyjs

from collective_pipeline.config import MODEL_TYPES, ComparisonConfig
from collective_pipeline.data.splits import Images
from collective_pipeline.evaluation.comparison import COMPARISON_COLUMNS, RUN_COLUMNS, compare_arms
from collective_pipeline.evaluation.experts import CLASS_COLUMNS, SAMPLE_COLUMNS, UNIT_COLUMNS, ExpertAnalysis
from collective_pipeline.evaluation.gpu import COST_COLUMNS, GPU_COLUMNS
from collective_pipeline.evaluation.report import render, write_report

FACTS = {"Command": {"command": "kedro run --pipeline phase1"}, "Machine": {"device": "cpu"}}


def make_history(results: pd.DataFrame) -> pd.DataFrame:
    figures = {"phase": "train", "val_accuracy": 97.0, "val_loss": 0.1, "train_loss": 0.1}
    return results[["model_type", "seed"]].assign(epoch=1, **figures)


def make_report(arms=MODEL_TYPES, num_seeds=3, off_target=1.0, **changes) -> str:
    rng = np.random.default_rng(0)
    seeds = range(42, 42 + num_seeds)
    results = pd.DataFrame(
        [
            {
                **dict.fromkeys(RUN_COLUMNS, 1.0),
                **dict.fromkeys(GPU_COLUMNS, np.nan),
                "model_type": arm,
                "seed": seed,
                "params": 560_000,
                "param_error_pct": off_target,
                "test_accuracy": 97 + rng.random(),
                "latency_ms": 0.5,
                "diverged": False,
            }
            for arm, seed in itertools.product(arms, seeds)
        ]
    )
    history = make_history(results)
    report = {
        "title": "Phase 1 on MNIST",
        "answer": "It depends.",
        "results": results,
        "comparison": compare_arms(results, ComparisonConfig(resamples=200)),
        "history": history,
        "facts": FACTS,
        "top5": {},
    }
    return write_report(**report | changes)


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.cdata_elem is None and data.strip():
            self.texts.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def html() -> str:
    return make_report()


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_nothing_is_fetched(html, page):
    own = html.replace(get_plotlyjs(), "")
    assert len(own) == len(html) - len(get_plotlyjs()), "plotly.js exactly once"
    for word in ("http://", "https://", "@import", "@font-face", "url("):
        assert word not in own
    addresses = [attributes.get(name) for _, attributes in page.tags for name in ("src", "href") if name in attributes]
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    assert "default-src 'none'" in page.all("meta")[2]["content"]


def test_the_answer_comes_first(page):
    assert ("Phase 1 on MNIST", "It depends.") in pairwise(page.texts)


def test_the_page_can_be_read_aloud(page):
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1
    assert len(page.all("caption")) == len(page.all("table")) == 3
    plots = [attributes for attributes in page.all("div") if attributes.get("class") == "plot"]
    assert len(plots) == 4
    assert all(plot["role"] == "img" and plot["aria-label"] for plot in plots)


def test_tables_download_as_the_promised_files(page):
    files = {
        link["download"]: pd.read_csv(io.StringIO(unquote(link["href"].split(",", 1)[1])))
        for link in page.all("a")
        if "download" in link
    }
    assert tuple(files["comparison.csv"]) == COMPARISON_COLUMNS
    assert tuple(files["runs.csv"]) == RUN_COLUMNS
    assert len(files["runs.csv"]) == 3 * len(MODEL_TYPES)


def test_every_arm_and_every_fact_is_on_the_page(page):
    for expected in (*MODEL_TYPES, "Machine", "device", "cpu"):
        assert expected in page.texts


def test_everything_is_escaped():
    evil = "<script>alert(1)</script>"
    html = make_report(
        arms=("collective", evil), title=evil, answer=evil, facts={evil: {evil: evil}}, reference="collective"
    )
    assert evil not in html
    assert evil in Page(html).texts


def test_a_single_arm_has_no_comparison():
    html = make_report(arms=("very_deep_resnet",), num_seeds=1)
    page = Page(html)
    assert "Result" in page.texts
    assert not any("Difference" in text or "Paired" in text or "against size" in text for text in page.texts)
    assert sum(attributes.get("class") == "plot" for attributes in page.all("div")) == 1
    assert not any(text == "nan" for text in page.texts)


@pytest.mark.parametrize("arms", [("resnet18",), ("collective", "narrow")])
def test_top5_accuracy_stands_beside_the_accuracy_where_it_is_known(arms):
    """Of each arm; of a single one among the key figures too. The files keep their columns."""
    top5 = {"resnet18": 91.256, "collective": 91.256, "narrow": 90.0}
    page = Page(make_report(arms=arms, top5=top5))
    told = ["Top-5 accuracy", "91.26 %"] if len(arms) == 1 else []
    told += ["Top-5 accuracy (%)", "91.26", *["90.00"][: len(arms) - 1]]

    assert [text for text in page.texts if "Top-5" in text or text[:5] in {"91.26", "90.00"}] == told
    files = [link["href"] for link in page.all("a") if link.get("download") == "comparison.csv"]
    assert {tuple(pd.read_csv(io.StringIO(unquote(file.split(",", 1)[1])))) for file in files} == {COMPARISON_COLUMNS}
    assert not any("Top-5" in text for text in Page(make_report(arms=arms)).texts)


@pytest.mark.parametrize("arms", [("resnet18",), MODEL_TYPES])
@pytest.mark.parametrize("off_target", [0.0, 0.0001, -0.1])
def test_a_target_is_told_of_only_where_it_is_missed(arms, off_target):
    """A network whose size was not asked for is its own target."""
    told = [text for text in Page(make_report(arms=arms, num_seeds=1, off_target=off_target)).texts if "target" in text]

    assert told == (["-0.100 % off the target", "Parameters off target (%)"] if off_target == -0.1 else [])


def test_what_diverged_is_in_the_tables():
    """Beside the number of seeds, and at the run itself, whose accuracy may be missing."""
    arms = ("collective", "shallow")
    results = pd.DataFrame(
        [
            {
                **dict.fromkeys(RUN_COLUMNS, 1.0),
                **dict.fromkeys(GPU_COLUMNS, np.nan),
                "model_type": arm,
                "seed": seed,
                "params": 560_000,
                "epochs": 3,
                "best_epoch": 0 if (arm, seed) == ("shallow", 2) else 3,
                "test_accuracy": np.nan if (arm, seed) == ("shallow", 2) else 97.0 + seed,
                "latency_ms": 0.5,
                "diverged": (arm, seed) == ("shallow", 2),
            }
            for arm, seed in itertools.product(arms, (1, 2, 3))
        ]
    )
    history = make_history(results).assign(train_loss=np.inf)
    page = make_report(
        results=results, comparison=compare_arms(results, ComparisonConfig(resamples=200)), history=history
    )

    assert "2, 1 diverged" in page and "3, diverged" in page


def test_the_gpu_is_on_the_page_only_where_there_was_one():
    results = pd.DataFrame(
        {
            **dict.fromkeys(RUN_COLUMNS, 1.0),
            **dict.fromkeys((*GPU_COLUMNS, *COST_COLUMNS), np.nan),
            "model_type": ["collective", "shallow"],
            "seed": 1,
            "params": 560_000,
            "test_accuracy": 97.0,
            "latency_ms": 0.5,
            "diverged": False,
        }
    )
    history = make_history(results)
    config = ComparisonConfig(resamples=200)
    without = Page(make_report(results=results, comparison=compare_arms(results, config), history=history))
    assert "GPU" not in without.texts and not without.all("li")
    assert not {"What it cost.", "GPU-hours", "GPU-hours per seed"} & set(without.texts)

    known = results.assign(gpu_utilization_mean=12.0, joules=1234.0, gpu_hours=0.5, cost=1.25)
    page = Page(make_report(results=known, comparison=compare_arms(known, config), history=history))
    assert "GPU" in page.texts and "1,234" in page.texts and len(page.all("li")) == 1
    assert {"What it cost.", "GPU-hours", "GPU-hours per seed", "Cost per seed", "1.25"} <= set(page.texts)
    assert "Energy (kWh)" not in page.texts
    assert not any(text == "nan" for text in page.texts)


def analysis_of_members():
    """Of a collective: no gates, and what probes say."""
    about = {"model_type": "collective", "seed": 42, "unit": "analyst 3", "class": "7", "accuracy": 91.5}
    unit = about | {"num_gates": 0, "accuracy_lost_without": 0.25}
    together = {"model_type": "collective", "seed": 42, "accuracy": 97.0, "oracle_accuracy": 99.25}
    sample = about | {"image": 0, "prediction": "1", "says": "7", "confidence_pct": 80.0}
    rows = (
        [{name: row.get(name) for name in columns}]
        for row, columns in zip((unit, about, sample), (UNIT_COLUMNS, CLASS_COLUMNS, SAMPLE_COLUMNS), strict=True)
    )
    units, classes, samples = rows
    return ExpertAnalysis.of_rows(units, classes, [together], samples)


def test_experts_have_tables_figures_and_files_without_columns_that_say_nothing():
    images = Images(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    page = Page(make_report(experts=analysis_of_members(), images=images))
    files = [link["download"] for link in page.all("a") if "download" in link]

    for told in ("analyst 3", "91.50", "+0.25", "99.25", "Accuracy alone (%)", "At least one right alone (%)"):
        assert told in page.texts
    for empty in (
        "Gates",
        "Open (%)",
        "Information about the class (bits)",
        "Entropy of use (bits)",
        "Classes of its sub-model",
    ):
        assert empty not in page.texts
    assert {
        "expert_analysis.csv",
        "expert_analysis_by_seed.csv",
        "expert_analysis_by_class.csv",
        "sample_predictions.csv",
    } <= set(files)
    titles = ("Experts by class, seed 42", "Sample predictions, seed 42")
    assert all(title in page.texts for title in titles)


def test_without_experts_there_is_no_section_of_them(page):
    images = Images(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))

    assert Page(make_report(experts=ExpertAnalysis.of_rows(), images=images)).texts == page.texts


@pytest.mark.parametrize("number", [2, 3, 4, 5, 6, 7])
def test_no_key_figure_is_alone_in_a_row(number):
    """Rows are as long as each other, or the last one lacks one, on a wide screen and on a narrow one."""
    parts = dict.fromkeys(("tables", "hints", "notes", "figures", "details"), ())
    key_figures = {f"figure {i}": ("1", "") for i in range(number)}
    html = render(title="", answer="", heading="", costs="", gpu=None, facts={}, key_figures=key_figures, **parts)
    style = next(tag["style"] for tag in Page(html).all("dl") if tag.get("class") == "key")

    for columns in (int(value.rpartition(":")[2]) for value in style.split(";")):
        assert columns > 1
        assert (-number) % columns <= 1
