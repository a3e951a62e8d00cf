"""How long it takes to match all six single networks to a parameter budget, and how far off they are.

    python benchmarks/matching.py

The budgets are the collective's two sizes, the six of the size comparison, and the two sizes on CIFAR-10's images.
Matching is arithmetic on the CPU, so there is no device or size to choose. Times are medians over the repeats.
"""

import argparse
import statistics
import time

import torch

from collective_pipeline.config import BASELINES, DEBUG, PHASE1, BaselineConfig
from collective_pipeline.models.matching import count_collective, match_baseline
from conditions import describe

MNIST_FEATURES, CIFAR_FEATURES = 784, 3072
TARGETS = (1_800_000, 2_850_000, 3_950_000, 5_000_000, 6_100_000, 7_150_000)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()

    def size(name: str, features: int) -> int:
        collective = (DEBUG if name == "debug" else PHASE1).collective
        return count_collective(collective, in_dim=features, num_classes=10)

    budgets = [(f"{name}, MNIST", MNIST_FEATURES, size(name, MNIST_FEATURES)) for name in ("debug", "phase1")]
    budgets += [(f"{target / 1e6:.2f} million, MNIST", MNIST_FEATURES, target) for target in TARGETS]
    budgets += [(f"{name}, CIFAR-10", CIFAR_FEATURES, size(name, CIFAR_FEATURES)) for name in ("debug", "phase1")]

    print(f"{describe(torch.device('cpu'))}; {options.repeats} repeats")
    print(f"{'budget':<22}{'parameters':>11}{'ms, all six':>13}{'largest error %':>17}  of")
    total, errors = 0.0, []
    for name, features, target in budgets:
        times = []
        for _ in range(options.repeats):
            started = time.perf_counter()
            arms = [
                match_baseline(kind, target, BaselineConfig(), in_dim=features, num_classes=10) for kind in BASELINES
            ]
            times.append(1000 * (time.perf_counter() - started))
        worst = max(arms, key=lambda arm: abs(arm.param_error_pct))
        total += statistics.median(times)
        errors.append((abs(worst.param_error_pct), worst.model_type))
        print(
            f"{name:<22}{target:>11,}{statistics.median(times):>13.1f}{worst.param_error_pct:>+17.3f}"
            f"  {worst.model_type}"
        )
    error, kind = max(errors)
    print(f"{'all ten':<33}{total:>13.1f}{error:>17.3f}  {kind}")


if __name__ == "__main__":
    main()
