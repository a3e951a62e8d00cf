"""What every benchmark is asked, and what stands above its table: without the machine and the date no number counts."""

import argparse
import datetime
import os
import platform
from pathlib import Path

import torch

from collective_pipeline.config import DEBUG, PHASE1, Parameters
from collective_pipeline.data.small_images import load_images
from collective_pipeline.data.splits import Splits, make_splits

ROOT = Path(__file__).parents[1]


def make_parser(about: str | None) -> argparse.ArgumentParser:
    """Its `--help` says what the script does, as the script's first lines say it."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda, or else cpu")
    parser.add_argument("--size", choices=["debug", "phase1"], default="debug", help="of the networks and batches")
    return parser


def settings_of(size: str) -> Parameters:
    """The parameters of this size."""
    return DEBUG if size == "debug" else PHASE1


def split_mnist(settings: Parameters) -> Splits:
    """The embedded images, split as a run splits them."""
    raw = load_images("mnist", ROOT / "data" / "01_raw" / "mnist")
    return make_splits(raw, val_fraction=settings.data.val_fraction, split_seed=settings.data.split_seed)


def describe(device: torch.device) -> str:
    """Hardware, threads, torch, date, and how busy the machine was: times of a busy one are not to be trusted."""
    card = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    return (
        f"{card}{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load before "
        f"{os.getloadavg()[0]:.1f}; Python {platform.python_version()}, torch {torch.__version__}; "
        f"{datetime.date.today()}"
    )


def _processor() -> str:
    """Its model, which Python itself does not know on Linux."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
