"""Batch normalization over the batches of all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class GlobalBatchNorm1d(nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` over the batches of all ranks as one batch.

    TorchRec wraps dense layers so that buffers are not broadcast. The running statistics of plain
    batch normalization would differ between ranks, and every rank would evaluate a different model.
    `torch.nn.SyncBatchNorm` does the same as this module, but runs only on GPUs. Training is
    collective, over the default process group; without a process group, and in evaluation, this is
    plain batch normalization.

    Args:
        num_features: number of features N.
        device: device of the parameters and the statistics.
    """

    def __init__(self, num_features: int, device: torch.device) -> None:
        super().__init__(num_features, device=device)

    def forward(self, input: Tensor) -> Tensor:
        """Normalized features, (B, N); B may differ between ranks."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        # In float64, because the variance is a difference of means.
        x_BN = input.double()
        sums = all_reduce(torch.stack([x_BN.sum(0), x_BN.square().sum(0)]))
        rows = x_BN.new_tensor(len(x_BN))
        dist.all_reduce(rows)
        mean_N, square_N = sums / rows
        variance_N = square_N - mean_N.square()
        self._track(mean_N.detach(), variance_N.detach() * rows / (rows - 1))
        normal_BN = (x_BN - mean_N) * (variance_N + self.eps).rsqrt()
        return normal_BN.to(input.dtype) * self.weight + self.bias

    @torch.no_grad()
    def _track(self, mean_N: Tensor, unbiased_variance_N: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean_N.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased_variance_N.to(self.running_var.dtype), self.momentum)
