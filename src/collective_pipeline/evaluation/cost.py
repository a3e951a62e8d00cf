"""What an answer costs: multiply-accumulates counted by torch, latency measured."""

import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from collective_pipeline.config import Arm
from collective_pipeline.models.build import build_arm

WARM_UP = 10
REPEATS = 100


def count_macs(arm: Arm) -> int:
    """Multiply-accumulates of one image, forward; torch counts two operations for each."""
    with torch.device("meta"):
        model = build_arm(arm).eval()
        images = torch.empty(1, 1, arm.in_dim)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return int(counter.get_total_flops()) // 2


def measure_latency(arm: Arm, device: torch.device, *, batch_size: int = 1) -> float:
    """Median milliseconds from a batch on the device, by default of one image, to its logits there, over 100 times."""
    model = build_arm(arm).to(device).eval()
    images = torch.zeros(1, batch_size, arm.in_dim, device=device)
    milliseconds = []
    with torch.inference_mode():
        for _ in range(WARM_UP + REPEATS):
            started = time.perf_counter()
            model(images)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            milliseconds.append(1000 * (time.perf_counter() - started))
    return statistics.median(milliseconds[WARM_UP:])
