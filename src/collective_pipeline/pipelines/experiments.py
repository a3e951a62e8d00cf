"""What is known of every pipeline before it runs: which parameters it reads."""

from collections.abc import Iterable
from dataclasses import dataclass

from collective_pipeline.config import Parameters, UserError, parameter_names


@dataclass(frozen=True)
class Experiment:
    """A pipeline, as seen from the command line.

    Attributes:
        reads: Its parameters: whole sections, or names in them.
    """

    reads: tuple[str, ...]

    def is_reader_of(self, name: str) -> bool:
        """Whether it reads the parameter of this dotted name."""
        return any(name == read or name.startswith(f"{read}.") for read in self.reads)


MATCHED = ("dataset", "seeds", "resume", "device", "data", "collective", "baselines", "training", "comparison")
# Of experiments that have a data set, seeds, a training and a reference of their own.
SHARED = ("resume", "device", "data", "comparison.confidence", "comparison.resamples")

# The one that `kedro run` alone runs.
DEFAULT = "single"
# By their names in the registry.
EXPERIMENTS = {
    "single": Experiment((*MATCHED, "model_type")),
    "phase1": Experiment(MATCHED),
    "sweep": Experiment((*MATCHED, "sweep")),
    "deepmoe": Experiment((*SHARED, "deepmoe")),
    "merged_moe": Experiment((*SHARED, "merged_moe")),
    "predict": Experiment(("images", "model_type", "dataset", "checkpoint", "checkpoint_seed", "device")),
}


def check_read(given: Iterable[str], pipelines: Iterable[str]) -> None:
    """Refuse parameters on the command line that would change nothing.

    Args:
        given: Their dotted names.
        pipelines: Those that are run.

    Raises:
        UserError: Naming each that none of them reads, and what to use instead.
    """
    pipelines = list(pipelines)
    unread = [name for name in given if not any(EXPERIMENTS[pipeline].is_reader_of(name) for pipeline in pipelines)]
    if unread:
        raise UserError("; ".join(_sentence(name, pipelines) for name in unread))


def _sentence(name: str, pipelines: list[str]) -> str:
    known = [
        known
        for known in parameter_names(Parameters)
        if any(EXPERIMENTS[pipeline].is_reader_of(known) for pipeline in pipelines)
    ]
    # What is called so in the pipeline's own section; or without the section of another pipeline.
    own = [found for tail in (name, name.partition(".")[2]) for found in known if f".{found}".endswith(f".{tail}")]
    readers = [other for other, experiment in EXPERIMENTS.items() if experiment.is_reader_of(name)]
    advice = f"use `{own[0]}`" if own else f"it is a parameter of --pipeline {', '.join(readers)}"
    return f"`{name}` is not read by --pipeline {','.join(pipelines)}: {advice}"
