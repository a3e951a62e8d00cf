"""Where and in which precision a network runs."""

import contextlib
import platform
from contextlib import AbstractContextManager

import torch

from collective_pipeline.config import TrainingConfig, UserError, count_of

LAYERS_A_PRIORITY = 4


def choose_device(name: str) -> torch.device:
    """The named device, or for `auto` the first there is of cuda, mps, cpu.

    Raises:
        UserError: If the machine does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device={name}: this machine has {torch.cuda.device_count() or 'no'} CUDA device(s) that torch "
            f"{torch.__version__} can use; choose device=cpu, or device=auto for the best there is"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps: this machine has no Apple GPU that torch can use; choose device=cpu or auto")
    return device


def set_matmul_precision(config: TrainingConfig, device: torch.device) -> None:
    """TF32 matrix products on CUDA where the configuration allows them, full fp32 otherwise."""
    allowed = device.type == "cuda" and config.precision != "fp32"
    torch.set_float32_matmul_precision("high" if allowed else "highest")


def side_stream(device: torch.device, *, depth: int) -> AbstractContextManager[object]:
    """On CUDA a stream of the caller's own: arms side by side then share the card, and graphs need one.

    The deeper a network, the higher its stream's priority: its many small kernels leave room that others fill, and it
    would otherwise be the last to end, with the card nearly to itself. For 0 it is that of what decodes images, which a
    higher one would leave waiting for the gaps.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    stream = torch.cuda.Stream(device, priority=-(depth // LAYERS_A_PRIORITY))
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


def autocast(config: TrainingConfig, device: torch.device) -> AbstractContextManager[object]:
    """Automatic bf16 or fp16 for the forward pass where the configuration names them, else full precision."""
    match config.precision:
        case "bf16":
            return torch.autocast(device.type, torch.bfloat16)
        case "fp16":
            return torch.autocast(device.type, torch.float16)
        case _:
            return contextlib.nullcontext()


def describe_device(device: torch.device) -> str:
    """The processor's or card's name, for tables and reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (
        f"{platform.processor() or platform.machine()} ({device.type}, {count_of(torch.get_num_threads(), 'thread')})"
    )
