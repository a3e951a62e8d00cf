"""What a person sees while an arm trains: where it is, how well it does, and how long it will take."""

import logging
import time
from collections.abc import Iterable, Iterator

import torch

from collective_pipeline.config import DEBUG
from collective_pipeline.training.loop import Epoch

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0
LONG_SECONDS = 15 * 60
LONG_EPOCH_SECONDS = 60.0
# Of the cores that torch's threads are to have, they have about 0.95 on a quiet machine. Where others take a part of
# them, the threads wait for each other at every small operation, and training is 10 to 40 times slower.
QUIET_SHARE = 0.75
WARM_UP_STEPS = 20  # torch imports parts of itself at the first step, on one thread


class Progress:
    """Logs a line after the first epoch, the last, and those between that are some seconds apart.

    Args:
        arm: Its name.
        num_epochs: That it is to train.
        num_arms: That are trained one after another, this one among them.
        device_type: On a `cpu`, a comparison that takes long names the quick test.
        num_parts: How often `num_epochs` are trained, where seeds train in turn.
        brief: No line after the first epoch and the last: for one of very many short trainings.
    """

    def __init__(
        self, arm: str, *, num_epochs: int, num_arms: int, device_type: str, brief: bool = False, num_parts: int = 1
    ) -> None:
        self.brief = brief
        self.arm = arm
        self.num_epochs = num_epochs
        self.num_arms = num_arms
        self.num_parts = num_parts
        self.device_type = device_type
        self.last_line = time.perf_counter()
        self.epochs_done = 0
        self.started: tuple[float, float] | None = None
        self.share_is_known = False
        self.length_is_known = False
        self.first: Epoch | None = None

    def watch(self, stops: Iterable[int]) -> Iterator[int]:
        """The numbers of updates of an epoch that are done at each stop, with a line now and then if it is long."""
        numbers = list(stops)
        started = time.perf_counter()
        for number in numbers:
            yield number
            if self.started is None and number >= WARM_UP_STEPS:
                self.started = time.perf_counter(), time.process_time()
            elapsed = time.perf_counter() - started
            if elapsed > LONG_EPOCH_SECONDS and not self.length_is_known:
                self._warn_if_long(self.num_parts * elapsed * numbers[-1] / (number - numbers[0] + 1))
            if self._is_due(4 * SECONDS_BETWEEN_LINES):
                self._log(f"epoch {self.epochs_done + 1}: {100 * number / numbers[-1]:.0f} % of its steps")
                self._warn_if_busy()

    def __call__(self, epoch: Epoch) -> None:
        """Tell what this epoch gave, and after the first what all of it will take."""
        self.epochs_done = 0 if epoch.finished else epoch.number  # then the next seeds begin
        if epoch.restored:
            if epoch.finished and not epoch.partial and not self.brief:
                self._log(f"epoch {epoch.number}/{epoch.num_epochs}  is done")
            return
        per_epoch = self._pace(epoch)
        group, num_groups = epoch.group
        left = per_epoch * (epoch.num_epochs * (num_groups - group + 1) - epoch.number)
        is_end = epoch.number == 1 or epoch.finished
        if self._is_due(4 * SECONDS_BETWEEN_LINES) if self.brief else is_end or self._is_due(SECONDS_BETWEEN_LINES):
            score = (
                f"validation accuracy {epoch.mean('val_accuracy'):5.2f} %"
                if "val_accuracy" in epoch.metrics
                else f"{epoch.phase}, loss {epoch.mean('train_loss'):.4f}"
            )
            time_left = f"done in {duration(epoch.seconds)}" if epoch.finished else f"{duration(left)} left"
            of_seeds = f"seeds, part {group}/{num_groups}  " if epoch.partial else ""
            self._log(
                f"{of_seeds}epoch {epoch.number}/{epoch.num_epochs}  {score}  {per_epoch:.1f} s/epoch  {time_left}"
            )
        self._warn_if_busy()
        if not self.length_is_known and (self.device_type != "cuda" or epoch.number > 1):
            self._warn_if_long(per_epoch * num_groups)

    def _pace(self, epoch: Epoch) -> float:
        """Seconds an epoch, without the first one that is told: on a GPU it also compiles and records."""
        if self.first is None or epoch.number <= self.first.number:  # or it is of other seeds than the one before
            self.first = epoch
        if epoch.number == self.first.number:
            return epoch.seconds / epoch.number
        return (epoch.seconds - self.first.seconds) / (epoch.number - self.first.number)

    def _warn_if_long(self, per_epoch: float) -> None:
        """Tell once, as soon as it can be known."""
        self.length_is_known = True
        seconds = per_epoch * self.num_epochs
        if seconds * self.num_arms < LONG_SECONDS:
            return
        # Of this arm alone: the others may be far faster or slower.
        beside = f", and it is one of {self.num_arms} arms" if self.num_arms > 1 else ""
        is_short_plan = self.num_epochs <= DEBUG.training.epochs
        advice = (
            "; for an answer in minutes use the debug environment, kedro run --env debug, or a GPU"
            if self.device_type == "cpu" and not is_short_plan
            else ""
        )
        logger.warning("At this pace %s will take about %s%s%s.", self.arm, duration(seconds), beside, advice)

    def _warn_if_busy(self) -> None:
        """Tell once if other programs have the cores.

        The number of threads is not changed here: it changes how sums are rounded, and the same seed on the same
        machine must give the same result.
        """
        num_threads = torch.get_num_threads()
        if self.started is None or self.share_is_known or self.device_type != "cpu" or num_threads == 1:
            return
        wall, busy = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        self.share_is_known = wall > 1
        if wall > 1 and busy / wall < QUIET_SHARE * num_threads:
            logger.warning(
                "Other programs use this machine's cores, and torch's %d threads wait for each other: let the others "
                "finish, or start again with OMP_NUM_THREADS=1, which is far faster on a busy machine.",
                num_threads,
            )

    def _is_due(self, seconds: float) -> bool:
        return time.perf_counter() - self.last_line >= seconds

    def _log(self, text: str) -> None:
        self.last_line = time.perf_counter()
        logger.info("%-16s  %s", self.arm, text)


def duration(seconds: float) -> str:
    """Seconds in the unit in which a person would say them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 10 * 60:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
