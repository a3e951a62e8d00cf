"""What losses at ever higher learning rates say: a rate to try, a figure, and a page."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]

from collective_pipeline.evaluation.figures import COLORS, finish
from collective_pipeline.evaluation.report import Columns, make_figure, make_table, render

RATE_COLUMNS = ("rate", "loss", "smoothed")
# Of all updates, those on either side that a loss is averaged with, the nearer the more.
REACH = 0.03
# So many times what a loss typically differs from the one before, the smoothed loss has to fall by. Where losses are
# nothing but noise it falls that far in one search of a hundred with 20 updates, and in fewer with more.
CLEAR = 4.0


def tabulate_rates(rates: Sequence[float], losses: Sequence[float], *, planned: int) -> pd.DataFrame:
    """`RATE_COLUMNS`, a row for each update; `planned` is how many there were to be, which sets how much is smoothed.

    The mean reaches to both sides, so that a fall is not told later than it was. Losses that are not finite have none.
    """
    loss = np.asarray(losses, dtype=float)
    reach = _reach(planned)
    weights = np.bartlett(2 * reach + 3)[1:-1]
    known = np.isfinite(loss)
    total = _convolve(np.where(known, loss, 0.0), weights)
    smoothed = np.where(known, total / np.maximum(_convolve(known.astype(float), weights), 1e-12), np.nan)
    return pd.DataFrame({"rate": list(rates), "loss": loss, "smoothed": smoothed})


def _reach(planned: int) -> int:
    """Of a smoothed loss to either side, in updates."""
    return max(1, round(REACH * planned))


def _convolve(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    reach = len(weights) // 2
    return np.convolve(np.pad(values, reach), weights, mode="valid")


def suggest_rate(table: pd.DataFrame) -> dict[str, float | None]:
    """`suggested_rate`, where the smoothed loss falls fastest along the logarithm of the rate, and that of its lowest.

    None where it does not fall clearly, by `CLEAR` times the noise. Before the fall begins, when the loss was last not
    below its start by more than the noise, a slope is noise too.
    """
    known = table.dropna()
    smoothed = known["smoothed"].to_numpy()
    # A median, which neither the fall nor an explosion moves much.
    noise = float(known["loss"].diff().abs().median())
    if len(known) < 2 or smoothed[0] - smoothed.min() < CLEAR * noise or smoothed[0] == smoothed.min():
        return {"suggested_rate": None, "rate_of_lowest_loss": None, "lowest_loss": None}
    lowest = int(smoothed.argmin())
    begins = int(np.flatnonzero(smoothed[:lowest] >= smoothed[0] - noise)[-1])
    falling = known.iloc[begins : lowest + 1]
    slopes = np.gradient(falling["smoothed"].to_numpy(), np.log(falling["rate"].to_numpy()))
    return {
        "suggested_rate": float(falling["rate"].iloc[int(slopes.argmin())]),
        "rate_of_lowest_loss": float(falling["rate"].iloc[-1]),
        "lowest_loss": float(falling["smoothed"].iloc[-1]),
    }


def answer_rates(found: Mapping[str, float | None], table: pd.DataFrame, *, name: str, planned: int) -> str:
    """One sentence or two."""
    first, last = table["rate"].iloc[0], table["rate"].iloc[-1]
    if found["suggested_rate"] is None:
        return (
            f"The loss of {name} does not fall clearly at any rate from {first:.1e} to {last:.1e}, so that none is "
            f"suggested: {_advise(table, planned)}."
        )
    told = (
        f"The loss of {name} falls fastest at a learning rate of {found['suggested_rate']:.1e} and is lowest at "
        f"{found['rate_of_lowest_loss']:.1e}."
    )
    if len(table) < planned:
        return f"{told} By {last:.1e} it had exploded."
    if _falls_to_the_end(table, planned):
        return f"{told} It still falls at the highest rate that was tried: lr_finder.highest may be higher."
    return told


def _advise(table: pd.DataFrame, planned: int) -> str:
    """What to change where the loss does not fall clearly."""
    first, last = table["rate"].iloc[0], table["rate"].iloc[-1]
    more = f"more updates, lr_finder.updates above {planned}"
    if len(table) < planned:
        return f"it exploded, so give a lower lr_finder.lowest than {first:.1e} or {more}"
    if _place_of_lowest(table) <= _reach(planned):
        return f"it is lowest at the first rates, so give a lower lr_finder.lowest than {first:.1e} or {more}"
    if _falls_to_the_end(table, planned):
        return f"it is lowest at the last rates, so give a higher lr_finder.highest than {last:.1e} or {more}"
    return f"give it {more}"


def _falls_to_the_end(table: pd.DataFrame, planned: int) -> bool:
    """Whether the loss is lowest so near the end of the table that smoothing may have moved it from there."""
    return _place_of_lowest(table) >= len(table) - 1 - _reach(planned)


def _place_of_lowest(table: pd.DataFrame) -> int:
    """The row of the lowest smoothed loss; the first where none has any."""
    return int(table["smoothed"].fillna(np.inf).to_numpy().argmin())


def plot_rates(table: pd.DataFrame, found: Mapping[str, Any]) -> go.Figure:
    """Loss against rate, both as measured and smoothed, with the suggestion if there is one."""
    figure = go.Figure()
    for column, name, color, width in (("loss", "Each update", COLORS[6], 1), ("smoothed", "Smoothed", COLORS[1], 3)):
        figure.add_scatter(
            x=table["rate"].tolist(),
            y=[None if pd.isna(value) else value for value in table[column].tolist()],
            name=name,
            mode="lines",
            line={"color": color, "width": width},
            hovertemplate="rate %{x:.2e}: loss %{y:.4f}<extra></extra>",
        )
    for key, name, color in (
        ("suggested_rate", "Falls fastest", COLORS[0]),
        ("rate_of_lowest_loss", "Lowest", COLORS[3]),
    ):
        if found[key] is not None:
            at = _row_at(table, found[key])
            figure.add_scatter(
                x=[at["rate"]],
                y=[at["smoothed"]],
                name=name,
                mode="markers",
                marker={"color": color, "size": 13, "symbol": "diamond"},
                hovertemplate=f"{name}: rate %{{x:.2e}}, loss %{{y:.4f}}<extra></extra>",
            )
    figure.update_xaxes(type="log", exponentformat="power")
    # An explosion would flatten all that is of interest.
    ends = table["smoothed"].min(), 1.2 * table["smoothed"].head(max(1, len(table) // 4)).max()
    figure.update_yaxes(range=[ends[0] - 0.1 * (ends[1] - ends[0]), ends[1] + 0.1 * (ends[1] - ends[0])])
    return finish(figure, "Loss against the learning rate", "Learning rate", "Training loss", height=480)


def _row_at(table: pd.DataFrame, rate: float) -> "pd.Series[float]":
    """The update with this rate, which a table that was read from text may have with another last digit."""
    return table.iloc[int((table["rate"] - rate).abs().argmin())]


FOUND: Columns = {
    "Rate": lambda row: row.what,
    "Learning rate": lambda row: f"{row.rate:.2e}",
    "Loss, smoothed": lambda row: f"{row.smoothed:.4f}",
}
UPDATES: Columns = {
    "Update": lambda row: f"{row.Index + 1}",
    "Learning rate": lambda row: f"{row.rate:.3e}",
    "Loss": lambda row: f"{row.loss:.4f}",
    "Smoothed": lambda row: "" if pd.isna(row.smoothed) else f"{row.smoothed:.4f}",
}
NOTE = (
    "Every update has a higher rate than the one before, by the same factor; nothing is scored but the loss of its "
    "training batches, which are those of the experiment."
)
NOTE_OF_FALL = (
    "Where the loss falls fastest a rate is high enough to learn and far from too high. With schedule=one_cycle it may "
    "be the highest of the cycle, and rates up to a third of that of the lowest loss are worth a try too."
)
NOTE_WITHOUT_FALL = (
    f"A loss falls clearly if the smoothed one falls, from its start to its lowest, by {CLEAR:g} times what the loss "
    "of an update typically differs from that of the one before (the median). With less, where it falls fastest would "
    "be a matter of chance. More updates give every rate longer to show what it does."
)


def write_rate_report(
    *, title: str, table: pd.DataFrame, found: Mapping[str, Any], facts: Mapping[str, Mapping[str, str]]
) -> str:
    """The page as HTML; `found` has the answer beside what `suggest_rate` gives, of which it shows what is not None."""
    named = {"Falls fastest": found["suggested_rate"], "Lowest": found["rate_of_lowest_loss"]}
    rates = pd.DataFrame(
        [{"what": what, **_row_at(table, rate).to_dict()} for what, rate in named.items() if rate is not None],
        columns=["what", *RATE_COLUMNS],
    )
    figure = make_figure(
        plot_rates(table, found), "On a logarithmic axis; each update is one point.", table, "lr_finder.csv"
    )
    updates = make_table("Every update", UPDATES, table, RATE_COLUMNS, "lr_finder.csv")
    # Two of its rows, and so with the same file.
    ends = make_table("Where the loss falls fastest, and where it is lowest", FOUND, rates, (), updates.file_name)
    return render(
        title=title,
        answer=found["answer"],
        key_figures={what: (f"{rate:.1e}", "learning rate") for what, rate in named.items() if rate is not None},
        heading="Rates",
        tables=[replace(ends, csv=updates.csv)] if ends.rows else [],
        costs="",
        gpu=None,
        hints=(),
        notes=(NOTE, NOTE_OF_FALL if ends.rows else NOTE_WITHOUT_FALL),
        figures=[figure],
        details=[updates],
        facts=facts,
    )
