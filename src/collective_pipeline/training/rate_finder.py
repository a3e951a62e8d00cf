"""How the loss takes ever higher learning rates (Smith 2017): the first updates of a training, each at a higher one."""

import logging
import math
import time
from collections.abc import Iterator

import torch

from collective_pipeline.config import Arm, LrFinderConfig, NotEnoughMemory, TrainingConfig
from collective_pipeline.data.splits import Splits
from collective_pipeline.data.streaming import StreamedSplits
from collective_pipeline.models.build import count_products
from collective_pipeline.training import interrupt
from collective_pipeline.training.loop import try_rates
from collective_pipeline.training.memory import advise, estimate_need, free_bytes, groups_that_fit
from collective_pipeline.training.progress import SECONDS_BETWEEN_LINES, duration
from collective_pipeline.training.runtime import set_matmul_precision, side_stream
from collective_pipeline.training.train import draw_network, draw_phases, make_batches

logger = logging.getLogger(__name__)

# The mean of so many losses in a row above so many times the lowest such mean, and above the first, is an explosion.
LAST = 5
EXPLODED = 4.0


def find_rates(
    arm: Arm,
    splits: Splits | StreamedSplits,
    config: TrainingConfig,
    finder: LrFinderConfig,
    *,
    device: torch.device,
) -> tuple[list[float], list[float]]:
    """Train one seed of the arm from its start at exponentially rising rates; the rates, and the loss at each.

    Everything but the rate is as `config` has it. It ends early once the loss explodes.

    Raises:
        Interrupted: If the run was told to stop.
        NotEnoughMemory: If there is no room for one seed.
    """
    set_matmul_precision(config, device)
    num_images = len(splits.train) if isinstance(splits, Splits) else 0
    need, free = estimate_need(arm, config, num_images=num_images), free_bytes(device)
    groups_that_fit([finder.seed], need, config, free=free)
    exponents = torch.linspace(math.log(finder.lowest), math.log(finder.highest), finder.updates, dtype=torch.float64)
    rates = exponents.exp().float()
    losses: list[float] = []
    try:
        with side_stream(device, depth=count_products(arm)):
            splits, seeds = splits.to(device), [finder.seed]
            first, *_ = draw_phases(arm, draw_network(arm, seeds), seeds, config, device)
            tried = try_rates(first, make_batches(splits, seeds, config), splits.val, config, rates)
            for loss in _tell(tried, rates, arm):
                losses.append(loss)
                if not math.isfinite(loss) or _has_exploded(losses):
                    break
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(f"{arm.model_type}: {advise(need, config, free=free)}") from error
    return rates[: len(losses)].tolist(), losses


def _has_exploded(losses: list[float]) -> bool:
    means = [sum(losses[i : i + LAST]) / LAST for i in range(len(losses) - LAST + 1)]
    return bool(means) and means[-1] > max(EXPLODED * min(means), means[0])


def _tell(losses: Iterator[float], rates: torch.Tensor, arm: Arm) -> Iterator[float]:
    """The same, with a line now and then; nothing is kept of a search that is stopped."""
    started = last_line = time.perf_counter()
    for done, loss in enumerate(losses, start=1):
        yield loss
        now = time.perf_counter()
        if now - last_line >= SECONDS_BETWEEN_LINES:
            last_line = now
            left = duration((now - started) / done * (len(rates) - done))
            rate = float(rates[done - 1])
            logger.info(
                "%s  update %d/%d  rate %.1e  loss %.4f  %s left", arm.model_type, done, len(rates), rate, loss, left
            )
        if interrupt.requested():
            interrupt.stop(f"nothing is written of the {done} of {len(rates)} updates that were done")
