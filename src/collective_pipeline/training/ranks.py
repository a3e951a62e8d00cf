"""Processes that train one network together, each on its part of every batch: what they tell each other.

After every update all of them have the same weights, moments and statistics, so that one can speak for all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

# The first one may have to index and pack before it trains. Where a rank dies, the launcher ends the others at once.
PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; alone it is the first of one, and nothing is told.

    Attributes:
        rank: Counted from 0.
        number: Of processes.
    """

    rank: int = 0
    number: int = 1

    @classmethod
    def join(cls) -> Self:
        """Meet the others, as the launcher's environment variables say: NCCL between GPUs, gloo between CPUs."""
        # Both, since ranks on GPUs also tell each other what is on the host.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether it is the one that reports and saves."""
        return self.rank == 0

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace floating-point tensors by their means over all ranks, in one message for each precision."""
        if self.number == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            own = [tensor for tensor in tensors if tensor.dtype == dtype]
            message = torch.cat([tensor.reshape(-1) for tensor in own])
            # A sum, since gloo has no mean; the same on every rank, bit for bit.
            dist.all_reduce(message)
            means = (message / self.number).split([tensor.numel() for tensor in own])
            for tensor, mean in zip(own, means, strict=True):
                tensor.copy_(mean.view_as(tensor))

    def mean(self, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Over all ranks."""
        means = {name: value.clone() for name, value in metrics.items()}
        self.average_(list(means.values()))
        return means

    def sum(self, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Over all ranks: where each has what its part of the images adds."""
        return (
            {name: self.number * value for name, value in self.mean(metrics).items()}
            if self.number > 1
            else {**metrics}
        )

    def agree(self, first_says: bool) -> bool:
        """What the first one says."""
        if self.number == 1:
            return first_says
        answer = torch.tensor(float(first_says and self.is_first))
        dist.all_reduce(answer)
        return bool(answer)

    def tell(self, what: Any) -> Any:
        """What the first one gives here; the others wait for it."""
        if self.number == 1:
            return what
        told = [what]
        dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        return told[0]

    def unite(self, own: set[str]) -> set[str]:
        """What any of them has."""
        of_ranks = [own] * self.number
        if self.number > 1:
            dist.all_gather_object(of_ranks, own)
        return set().union(*of_ranks)

    def share_(self, tensors: Sequence[Tensor]) -> None:
        """Give all ranks what the first one has in these tensors."""
        if self.number > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def leave(self) -> None:
        """Let the others go."""
        if self.number > 1:
            dist.destroy_process_group()


ALONE = Ranks()
