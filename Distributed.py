"""Several processes as one (torchrun): the batch is split, the loss and the batch statistics are those of the whole."""

import datetime
import os

import torch
import torch.distributed as dist
from torch import nn


def start(device):
    """Join the process group if torchrun launched this process; return (rank, world size, device of this process)."""
    device = torch.device(device)
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))  # others wait while rank 0 evaluates
    return dist.get_rank(), dist.get_world_size(), device


def stop():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier():
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def any_process(flag, device):
    """Return whether `flag` is true in any process; synchronises with the host."""
    if not dist.is_initialized():
        return flag
    flag = torch.tensor(float(flag), device=device)
    dist.all_reduce(flag)
    return flag.item() > 0


def gather(z):
    """Return (M, W b, D) from each process's (M, b, D), with the exact gradient.

    Every process then computes the loss of the whole batch. The backward pass adds the W equal gradients that reach a
    row, and DistributedDataParallel divides by W: what remains is the gradient of one process with the whole batch.
    """
    if not dist.is_initialized():
        return z
    places = z.new_zeros(dist.get_world_size(), *z.shape)  # each process fills its own; a sum puts them together
    places = places.index_put((torch.tensor(dist.get_rank(), device=z.device),), z)
    return _Sum.apply(places).transpose(0, 1).flatten(1, 2)


def wrap(net, device):
    """Return `net` with gradients averaged and batch statistics shared by the processes; `net` if there is one."""
    if not dist.is_initialized():
        return net
    if device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        return nn.parallel.DistributedDataParallel(net, device_ids=[device])
    for layer in net.modules():  # torch's SyncBatchNorm refuses the CPU
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            layer.__class__ = _GlobalBatchNorm
    return nn.parallel.DistributedDataParallel(net)


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return _Sum.forward(ctx, gradient)


class _GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the equal shares of all processes; its state is that of BatchNorm1d and 2d."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dtype, axes, shape = x.dtype, [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        x = x.to(self.weight.dtype)
        mean = _Sum.apply(x.mean(axes)) / dist.get_world_size()
        x = x - mean.view(shape)
        variance = _Sum.apply(x.square().mean(axes)) / dist.get_world_size()
        count = x.numel() // x.shape[1] * dist.get_world_size()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        x = x * (variance + self.eps).rsqrt().view(shape)
        return (x * self.weight.view(shape) + self.bias.view(shape)).to(dtype)
