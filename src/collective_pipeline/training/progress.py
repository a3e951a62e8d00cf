"""What a person sees while an arm trains: where it is, how well it does, and how long it will take."""

import logging
import time
from collections.abc import Iterable, Iterator
from statistics import fmean

from torch import Tensor

from collective_pipeline.data.batches import Batches
from collective_pipeline.training.loop import Epoch

logger = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]
SECONDS_BETWEEN_LINES = 5.0
LONG_SECONDS = 15 * 60


class Progress:
    """Logs a line after the first epoch, the last, and those between that are some seconds apart.

    Args:
        arm: Its name.
        num_arms: Of the whole comparison, for the estimate of its time.
        device_type: On a `cpu`, a comparison that takes long names the quick test.
    """

    def __init__(self, arm: str, *, num_arms: int, device_type: str) -> None:
        self.arm = arm
        self.num_arms = num_arms
        self.device_type = device_type
        self.last_line = time.perf_counter()
        self.epochs_done = 0

    def watch(self, batches: Batches) -> Iterator[Batch]:
        """The batches of an epoch, with a line now and then if it is a long one."""
        for step, batch in enumerate(_iterate(batches)):
            yield batch
            if self._is_due(4 * SECONDS_BETWEEN_LINES):
                self._log(f"epoch {self.epochs_done + 1}: {100 * (step + 1) / len(batches):.0f} % of its steps")

    def __call__(self, epoch: Epoch) -> None:
        """Tell what this epoch gave, and after the first what all of it will take."""
        self.epochs_done = epoch.number
        per_epoch = epoch.seconds / epoch.number
        left = per_epoch * (epoch.num_epochs - epoch.number)
        last = epoch.number == epoch.num_epochs
        if epoch.number == 1 or last or self._is_due(SECONDS_BETWEEN_LINES):
            score = (
                f"validation accuracy {fmean(epoch.metrics['val_accuracy']):5.2f} %"
                if "val_accuracy" in epoch.metrics
                else f"{epoch.phase}, loss {fmean(epoch.metrics['train_loss']):.4f}"
            )
            time_left = f"done in {duration(epoch.seconds)}" if last else f"{duration(left)} left"
            self._log(f"epoch {epoch.number}/{epoch.num_epochs}  {score}  {per_epoch:.1f} s/epoch  {time_left}")
        if epoch.number == 1:
            self._warn_if_long(per_epoch * epoch.num_epochs * self.num_arms)

    def _warn_if_long(self, seconds: float) -> None:
        if seconds < LONG_SECONDS:
            return
        what = f"all {self.num_arms} arms" if self.num_arms > 1 else "this arm"
        advice = (
            " on this CPU; for an answer in minutes use the debug environment, kedro run --env debug, or a GPU"
            if self.device_type == "cpu"
            else ""
        )
        logger.warning("At this pace %s will take about %s%s.", what, duration(seconds), advice)

    def _is_due(self, seconds: float) -> bool:
        return time.perf_counter() - self.last_line >= seconds

    def _log(self, text: str) -> None:
        self.last_line = time.perf_counter()
        logger.info("%-16s  %s", self.arm, text)


def duration(seconds: float) -> str:
    """Seconds in the unit in which a person would say them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _iterate(batches: Batches) -> Iterable[Batch]:
    return batches
