"""What a person sees while an arm trains: where it is, how well it does, and how long it will take."""

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

import torch

from collective_pipeline.config import ARM_NAME_WIDTH, DEBUG, Arm, Parameters, TrainingConfig, count_of
from collective_pipeline.data.splits import Splits
from collective_pipeline.data.streaming import StreamedSplits
from collective_pipeline.training.loop import Epoch

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0
LONG_SECONDS = 15 * 60
LONG_EPOCH_SECONDS = 60.0
# When the time of the whole plan is told, if the epoch is not over, by the pace of the second minute. On a GPU both are
# counted from the first stop of an epoch, before which an update may have compiled and been recorded.
FORECAST_SECONDS = 120.0
# Of the cores that torch's threads are to have, they have about 0.95 on a quiet machine. Where others take a part of
# them, the threads wait for each other at every small operation, and training is 10 to 40 times slower.
QUIET_SHARE = 0.75
MOST_UNSEEN = 0.5  # of an epoch, before its first stop, for its pace to be that of the rest
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
        weights: The work of each epoch, as `weigh_epochs` finds it; None: all are alike.
        price_per_hour: Of what GPUs the arm has for itself: a half of one's if it shares one with another arm. None:
            not known, or no GPU.
    """

    def __init__(
        self,
        arm: str,
        *,
        num_epochs: int,
        num_arms: int,
        device_type: str,
        brief: bool = False,
        num_parts: int = 1,
        weights: Sequence[float] | None = None,
        price_per_hour: float | None = None,
    ) -> None:
        self.brief = brief
        self.arm = arm
        self.num_epochs = num_epochs
        self.num_arms = num_arms
        self.num_parts = num_parts
        self.weights = [1.0] * num_epochs if weights is None else list(weights)
        self.price_per_hour = price_per_hour
        self.device_type = device_type
        self.last_line = time.perf_counter()
        self.started: tuple[float, float] | None = None
        self.share_is_known = False
        self.length_is_known = False
        self.is_forecast = brief
        self.last: Epoch | None = None
        self.stage_began = (0, 0.0)
        self.first: Epoch | None = None  # that is told, of the stage
        # The first and the last of the epoch that is running: which part of it was done, and when. What came before the
        # first may have compiled, for a minute and more. Where nothing compiles and an update takes so long itself, the
        # first is the beginning.
        self.stops: list[tuple[float, float]] = []

    @property
    def epochs_done(self) -> int:
        """Of the seeds that train now: after the last epoch of some, the next ones begin."""
        return 0 if self.last is None or self.last.finished else self.last.number

    @property
    def part(self) -> int:
        """Which of the groups of seeds trains now, from 1."""
        return 1 if self.last is None else self.last.group[0] + self.last.finished

    def watch(self, stops: Iterable[int]) -> Iterator[int]:
        """The numbers of updates of an epoch that are done at each stop, with a line now and then if it is long."""
        numbers = list(stops)
        compiles = self.device_type == "cuda"
        self.stops = []
        before = mark = began = (numbers[0] - 1) / numbers[-1], time.perf_counter()
        timer = threading.Timer(LONG_EPOCH_SECONDS, self._warn_of_update, [began, numbers[0] / numbers[-1]])
        timer.daemon = True
        if not compiles and not self.length_is_known:
            timer.start()
        for number in numbers:
            try:
                yield number
            finally:
                timer.cancel()
            if self.started is None and number >= WARM_UP_STEPS:
                self.started = time.perf_counter(), time.process_time()
            now = number / numbers[-1], time.perf_counter()
            if not self.stops:
                self.stops = [now if compiles or now[1] - began[1] <= LONG_EPOCH_SECONDS else began]
            first = self.stops[0]
            self.stops = [first, now]
            elapsed = now[1] - (first if compiles else began)[1]
            if elapsed <= LONG_EPOCH_SECONDS:
                mark = now
            else:
                if not self.length_is_known:
                    self._warn_if_long(self._expect(first, now))
                # The next stop would be too late.
                if elapsed + now[1] - before[1] > FORECAST_SECONDS and not self.is_forecast:
                    self._forecast(self._expect(mark, now))
            before = now
            if self._is_due(4 * SECONDS_BETWEEN_LINES):
                place = f"{_of_seeds(self.part, self.num_parts)}epoch {self.epochs_done + 1}"
                self._log(f"{place}: {100 * number / numbers[-1]:.0f} % of its steps")
                self._warn_if_busy()

    def __call__(self, epoch: Epoch) -> None:
        """Tell what this epoch gave, and after the first what all of it will take."""
        self._note_stage(epoch)
        if epoch.restored:
            if epoch.finished and not epoch.partial and not self.brief:
                self._log(f"epoch {epoch.number}/{epoch.num_epochs}  is done")
            return
        pace = self._pace(epoch)
        group, num_groups = epoch.group
        whole = sum(self.weights)
        left = pace * (whole * (num_groups - group + 1) - sum(self.weights[: epoch.number]))
        is_end = epoch.number == 1 or epoch.finished
        if self._is_due(4 * SECONDS_BETWEEN_LINES) if self.brief else is_end or self._is_due(SECONDS_BETWEEN_LINES):
            score = (
                f"validation accuracy {epoch.mean('val_accuracy'):5.2f} %"
                if "val_accuracy" in epoch.metrics
                else f"{epoch.phase}, loss {epoch.mean('train_loss'):.4f}"
            )
            time_left = f"done in {duration(epoch.seconds)}" if epoch.finished else f"{duration(left)} left"
            per_epoch = pace * self.weights[epoch.number - 1]
            place = f"{_of_seeds(group, num_groups)}epoch {epoch.number}/{epoch.num_epochs}"
            self._log(f"{place}  {score}  {per_epoch:.1f} s/epoch  {time_left}")
        self._warn_if_busy()
        if not self.length_is_known and (self.device_type != "cuda" or epoch.number > 1):
            self._warn_if_long(pace * whole * num_groups)
        if not self.is_forecast and epoch.seconds > FORECAST_SECONDS and self.price_per_hour is not None:
            self._forecast(pace * whole * num_groups)
        self.is_forecast = True  # from now on every line has the time left

    def _note_stage(self, epoch: Epoch) -> None:
        """Where the stage of this epoch began; every group of seeds begins anew."""
        if self.last is None or epoch.number <= self.last.number:
            self.first, self.stage_began = None, (0, 0.0)
        elif self.weights[epoch.number - 1] != self.weights[self.last.number - 1]:
            self.first, self.stage_began = None, (self.last.number, self.last.seconds)
        self.last = epoch

    def _pace(self, epoch: Epoch) -> float:
        """That of the stage, for all that is still to come.

        Its first epoch that is told counts only as long as there is no other, and from its first stop on.
        """
        first, self.first = self.first, self.first or epoch
        if first is not None:
            return measure_pace(self.weights, (first.number, first.seconds), (epoch.number, epoch.seconds))
        if self.stops and self.stops[0][0] < MOST_UNSEEN:
            (share, began), (_, ended) = self.stops[0], self.stops[-1]
            validation = time.perf_counter() - ended
            return ((ended - began) / (1 - share) + validation) / self.weights[epoch.number - 1]
        return measure_pace(self.weights, self.stage_began, (epoch.number, epoch.seconds))

    def _expect(self, since: tuple[float, float], now: tuple[float, float]) -> float:
        """Seconds of the whole plan, all its parts, at the pace between two moments of the epoch that is running.

        Args:
            since: Which part of the epoch was done, and when.
            now: Likewise, later.
        """
        done = self.epochs_done
        pace = measure_pace(self.weights, (done + since[0], since[1]), (done + now[0], now[1]))
        return self.num_parts * pace * sum(self.weights)

    def _forecast(self, seconds: float) -> None:
        """Tell once what the whole plan takes."""
        self.is_forecast = True
        epochs = count_of(self.num_epochs, "epoch")
        plan = f"the plan of {epochs}" + (f" with {self.num_parts} seeds in turn" if self.num_parts > 1 else "")
        cost = ""
        if self.price_per_hour is not None:
            cost = f" and costs {seconds / 3600 * self.price_per_hour:,.2f}"
        self._log(f"at the pace of its updates {plan} takes about {duration(seconds)}{cost}")

    def _warn_of_update(self, began: tuple[float, float], share: float) -> None:
        """While the first update of an epoch goes on: it takes at least as long as it has taken until now.

        Args:
            began: Which part of the epoch was done before it, and when.
            share: Which part of it will be done after it.
        """
        self._warn_if_long(self._expect(began, (share, time.perf_counter())), at_least=True)

    def _warn_if_long(self, seconds: float, *, at_least: bool = False) -> None:
        """Tell once, as soon as it can be known, if all of it takes so long, or `at_least` so long."""
        is_long = seconds * self.num_arms >= LONG_SECONDS
        self.length_is_known = is_long or not at_least
        if not is_long:
            return
        # Of this arm alone: the others may be far faster or slower.
        beside = f", and it is one of {self.num_arms} arms" if self.num_arms > 1 else ""
        is_short_plan = self.num_epochs <= DEBUG.training.epochs
        advice = (
            "; for an answer in minutes use the debug environment, kedro run --env debug, or a GPU"
            if self.device_type == "cpu" and not is_short_plan
            else ""
        )
        length = f"{'over' if at_least else 'about'} {duration(seconds)}"
        logger.warning("At this pace %s will take %s%s%s.", self.arm, length, beside, advice)

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
                "finish, or stop this with Ctrl-C and put OMP_NUM_THREADS=1 before the command that is told then: on a "
                "busy machine that is far faster.",
                num_threads,
            )

    def _is_due(self, seconds: float) -> bool:
        return time.perf_counter() - self.last_line >= seconds

    def _log(self, text: str) -> None:
        self.last_line = time.perf_counter()
        logger.info("%-*s  %s", ARM_NAME_WIDTH, self.arm, text)


def _of_seeds(part: int, num_parts: int) -> str:
    """Which seeds a line is of, where they train in turn."""
    return f"seeds, part {part}/{num_parts}  " if num_parts > 1 else ""


def make_progress(
    name: str,
    arm: Arm,
    splits: Splits | StreamedSplits,
    settings: Parameters,
    device: torch.device,
    *,
    num_gpus: float,
    num_arms: int = 1,
) -> Progress:
    """What tells of the arm called `name` while it trains as the settings say.

    Args:
        name, arm, splits, settings, device: What trains, and where.
        num_gpus: That the arm has for itself, if it trains on GPUs: a half of one if it shares one with another arm.
        num_arms: That are trained one after another, this one among them.
    """
    training, price = settings.training, settings.price_per_gpu_hour
    return Progress(
        name,
        num_epochs=training.epochs,
        num_arms=num_arms,
        device_type=device.type,
        num_parts=len(settings.seeds) if arm.is_convolutional else 1,
        weights=weigh_epochs(training, num_images=len(splits.train), image_size=splits.image_shape[-1]),
        price_per_hour=None if price is None or device.type != "cuda" else num_gpus * price,
    )


def weigh_epochs(config: TrainingConfig, *, num_images: int, image_size: int) -> list[float]:
    """How much work each epoch is: the pixels of its images, in units of those of `num_images` as they are.

    Args:
        config: With the stages of the plan, each with its batches and the size of its images.
        num_images: Of the training part.
        image_size: Pixels of a side where a stage names none.
    """
    weights = []
    for stage in config.plan():
        batch_size = stage.batch_size or config.batch_size
        seen = num_images // batch_size * batch_size / num_images
        weights += [seen * ((stage.image_size or image_size) / image_size) ** 2] * stage.epochs
    return weights


def measure_pace(weights: Sequence[float], since: tuple[float, float], now: tuple[float, float]) -> float:
    """Seconds that an epoch of weight 1 takes, as between two moments; the whole plan takes `sum(weights)` times that.

    Args:
        weights: The work of each epoch.
        since: Epochs done, parts of one included, and seconds that they took.
        now: Likewise, later.
    """
    return (now[1] - since[1]) / (_work(weights, now[0]) - _work(weights, since[0]))


def _work(weights: Sequence[float], epochs: float) -> float:
    whole = int(epochs)
    return sum(weights[:whole]) + (epochs - whole) * sum(weights[whole : whole + 1])


def duration(seconds: float) -> str:
    """Seconds in the unit in which a person would say them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 10 * 60:
        minutes, rest = divmod(round(seconds), 60)  # in this order, or the rest might be rounded to 60
        return f"{minutes} min {rest:02} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
