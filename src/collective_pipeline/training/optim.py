"""Optimisers, learning-rate schedules, averaging, and what is done to gradients: all of it seed by seed."""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, Optimizer, RMSprop

from collective_pipeline.config import TrainingConfig


def make_optimizer(parameters: Sequence[tuple[str, nn.Parameter]], config: TrainingConfig) -> Optimizer:
    """The configured optimiser, element by element and so for every seed alone; only matrices are decayed.

    Its learning rate is a tensor and its state is there from the start: a CUDA graph reads both from where they lie,
    and a resumed run fills them.
    """
    device = parameters[0][1].device
    rate = torch.tensor(config.learning_rate, device=device)
    matrices = [parameter for name, parameter in parameters if _is_matrix(name, parameter)]
    vectors = [parameter for name, parameter in parameters if not _is_matrix(name, parameter)]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas, epsilon, capturable = config.betas, config.epsilon, device.type == "cuda"
    optimizer: Optimizer
    # The fused kernels, where there are some, take a third of the time of the default ones, on a CPU too.
    match config.optimizer:
        case "adam":
            optimizer = Adam(groups, lr=rate, betas=betas, eps=epsilon, fused=True, capturable=capturable)
        case "adamw":
            optimizer = AdamW(groups, lr=rate, betas=betas, eps=epsilon, fused=True, capturable=capturable)
        case "adamax":
            optimizer = Adamax(groups, lr=rate, betas=betas, eps=epsilon, capturable=capturable)
        case "sgd":
            optimizer = SGD(groups, lr=rate, momentum=config.momentum, nesterov=config.nesterov, fused=True)
        case "rmsprop":
            optimizer = RMSprop(
                groups, lr=rate, alpha=config.alpha, eps=epsilon, momentum=config.momentum, capturable=capturable
            )
        case "adagrad":  # its decay of the rate is in `make_schedule`
            optimizer = Adagrad(groups, lr=rate, eps=epsilon)
        case "adadelta":
            optimizer = Adadelta(groups, lr=rate, rho=config.rho, eps=epsilon, capturable=capturable)
    _make_state(optimizer)
    return optimizer


def _make_state(optimizer: Optimizer) -> None:
    """As it is before the first step: torch makes it in that step, here one without gradients at a rate of 0."""
    rates = [group["lr"].clone() for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for group in optimizer.param_groups:
        group["lr"].zero_()
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None
        for tensor in optimizer.state[parameter].values():
            tensor.zero_()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"].copy_(rate)


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    # Weights of a Linear are (S, N, in, out), its bias is (S, N, 1, out); those of a Conv2d are (S, N, out, in, k, k).
    return parameter.ndim >= 4 and not name.endswith("bias")


def make_schedule(config: TrainingConfig, *, rate: float, num_updates: int, warmup_updates: int) -> Tensor:
    """The learning rate of every update, `(num_updates,)`: the configured schedule with `rate` as its highest.

    Adagrad divides it by 1 + `lr_decay` times the number of updates before (Duchi et al. 2011, torch's form).
    """
    shape = SHAPES[config.schedule]
    later = max(1, num_updates - warmup_updates)
    decay = config.lr_decay * (config.optimizer == "adagrad")
    return torch.tensor(
        [
            rate
            / (1 + decay * i)
            * ((i + 1) / (warmup_updates + 1) if i < warmup_updates else shape((i - warmup_updates) / later, config))
            for i in range(num_updates)
        ]
    )


def make_annealing(start: float, end: float, *, num_updates: int) -> Tensor:
    """A value for every update, `(num_updates,)`: `start` at the first, `end` at the last, half a cosine between."""
    progress = torch.linspace(0, 1, num_updates, dtype=torch.float64)
    return (end + (start - end) * 0.5 * (1 + (math.pi * progress).cos())).float()


def cosine(progress: float, config: TrainingConfig) -> float:
    """From 1 to 0 along half a cosine (Loshchilov & Hutter 2017)."""
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def one_cycle(progress: float, config: TrainingConfig) -> float:
    """Up from 1/25 to 1 over the first 30 %, then down to 1/250,000, both along a cosine (Smith & Topin 2019)."""
    start, peak, floor = 1 / 25, 0.3, 1 / 250_000
    if progress < peak:
        return 1 - (1 - start) * cosine(progress / peak, config)
    return floor + (1 - floor) * cosine((progress - peak) / (1 - peak), config)


def multi_step(progress: float, config: TrainingConfig) -> float:
    """Multiplied by `decay_factor` at every milestone."""
    return config.decay_factor ** sum(progress >= milestone for milestone in config.milestones)


SHAPES: dict[str, Callable[[float, TrainingConfig], float]] = {
    "constant": lambda progress, config: 1.0,
    "cosine": cosine,
    "one_cycle": one_cycle,
    "multi_step": multi_step,
}


def clip_by_seed(gradients: Sequence[Tensor], max_norm: float) -> None:
    """Scale each seed's gradients, the first dimension, so that their common norm is at most `max_norm`."""
    squares = [gradient.flatten(1).square().sum(dim=1) for gradient in gradients]
    norm_S = torch.stack(squares).sum(dim=0).sqrt()
    multiply_by_seed(gradients, (max_norm / (norm_S + 1e-6)).clamp(max=1.0))


def multiply_by_seed(gradients: Sequence[Tensor], factor_S: Tensor) -> None:
    """Multiply each seed's gradients by its factor, in place."""
    for gradient in gradients:
        gradient.mul_(factor_S.view(-1, *[1] * (gradient.ndim - 1)))


class LossScaler:
    """A loss scale for each seed, as fp16 needs it (Micikevicius et al. 2018); without fp16 it does nothing.

    torch's GradScaler has one scale for all parameters, which would let one seed's overflow skip the step of its
    neighbours. Here the seed that overflowed takes that step with a zero gradient, at half the scale from then on.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, num_seeds: int, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled
        self.scale_S = torch.full((num_seeds,), 2.0**16 if enabled else 1.0, device=device)
        self.clean_steps_S = torch.zeros(num_seeds, dtype=torch.int64, device=device)

    def scale(self, loss_S: Tensor) -> Tensor:
        return loss_S * self.scale_S if self.enabled else loss_S

    @torch.no_grad()
    def unscale_(self, gradients: Sequence[Tensor]) -> None:
        if not self.enabled:
            return
        finite_S = torch.stack([gradient.flatten(1).isfinite().all(dim=1) for gradient in gradients]).all(dim=0)
        multiply_by_seed(gradients, torch.where(finite_S, 1 / self.scale_S, 0.0))
        for gradient in gradients:
            gradient.nan_to_num_(0.0, 0.0, 0.0)
        self.clean_steps_S.add_(1).mul_(finite_S)
        grown_S = torch.where(self.clean_steps_S % self.GROWTH_INTERVAL == 0, 2.0, 1.0)
        self.scale_S.mul_(torch.where(finite_S, grown_S, 0.5))


class AveragedWeights:
    """Exponential moving average of a network's weights and buffers that forgets its start.

    decay_t = min(decay, (1 + t) / (10 + t)). torch's AveragedModel reads its counter from the device at every update,
    which makes the host wait for it.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, num_updates: Tensor) -> None:
        """Move towards `network`; `num_updates` is t, of one element on its device."""
        keep = ((1 + num_updates) / (10 + num_updates)).clamp(max=self.decay).squeeze()
        averaged = _float_state(self.network)
        steps = torch._foreach_sub(_float_state(network), averaged)
        torch._foreach_mul_(steps, 1 - keep)
        torch._foreach_add_(averaged, steps)


def _float_state(network: nn.Module) -> list[Tensor]:
    return [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]
