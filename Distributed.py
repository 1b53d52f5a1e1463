"""Several processes as one (torchrun): they share a batch, or a list of parts, and the result is that of one process.

All calls of torch.distributed are in this file.
"""

import contextlib
import datetime
import functools
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import Signals

_is_alone = False  # inside `alone`


LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells its processes


def is_launched():
    """Return whether torchrun, or another launcher that tells the same, has started this process."""
    return all(name in os.environ for name in LAUNCHED)


def local_rank():
    """Return the number of this process among those that a launcher has started on this machine; 0 without one."""
    return int(os.environ["LOCAL_RANK"]) if is_launched() else 0


def local_count():
    """Return the number of processes that a launcher has started on this machine; 1 without one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_launched() else 1


def is_first():
    """Return whether this is the only process, or the first of several: the one that prints and writes."""
    return dist.get_rank() == 0 if is_joined() else not is_launched() or os.environ["RANK"] == "0"


def is_joined():
    """Return whether this process has joined a group, by `start`, and works with it: not inside `alone`."""
    return dist.is_available() and dist.is_initialized() and not _is_alone


@contextlib.contextmanager
def alone():
    """A context in which this process works as if it were the only one, while the others do something else or wait."""
    global _is_alone
    before = _is_alone
    _is_alone = True
    try:
        yield
    finally:
        _is_alone = before


def count():
    """Return how many processes work together."""
    return dist.get_world_size() if is_joined() else 1


def say(text):
    """Print a line on standard output, in the first process only."""
    if is_first():
        print(text, flush=True)


def notice(text):
    """Print a line on standard error, in the first process only."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def start(device):
    """Join the process group if torchrun launched this process; return (rank, world size, device of this process).

    device: torch.device; with several processes on CUDA, each takes the card of its local rank.
    """
    if not is_joined() and not is_launched():
        if os.environ.get("WORLD_SIZE", "1") != "1":
            lacking = ", ".join(name for name in LAUNCHED if name not in os.environ)
            notice(f"this process works alone: WORLD_SIZE is set, but not {lacking}: start several by torchrun")
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # CUDA graphs are captured on the current one
        return 0, 1, device
    Signals.end_with_parent()
    if device.type == "cuda":
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    if not is_joined():
        backend = "nccl" if device.type == "cuda" else "gloo"
        card = device if device.type == "cuda" else None
        hours = datetime.timedelta(hours=2)  # others wait while rank 0 evaluates
        dist.init_process_group(backend, timeout=hours, device_id=card)
    return dist.get_rank(), dist.get_world_size(), device


def stop():
    """Leave the process group, if there is one."""
    if is_joined():
        _host_group.cache_clear()
        dist.destroy_process_group()


def barrier():
    """Wait for all processes."""
    if is_joined():
        dist.barrier()


def first_rank_only(work):
    """Return work(), or raise what it raises. With several processes the first calls it, and the others wait for it."""
    if not is_joined():
        return work()
    # a new group, because the work can take longer than the training's group waits
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    answer = [None, None]  # result, error
    if dist.get_rank() == 0:
        try:
            with alone():
                answer[0] = work()
        except Exception as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0, group=group)
    dist.destroy_process_group(group)
    result, error = answer
    if error is not None:
        raise error
    return result


def first_rank_first(work):
    """Return work(). With several processes, the first calls it before the others do, as for a download.

    Then the first of every other machine does, which can have a disk of its own.
    """

    def discard_result():
        work()

    if is_joined():
        first_rank_only(discard_result)
        if os.environ["LOCAL_RANK"] == "0" and not is_first():
            work()
        barrier()
    return work()


def any_process(flag):
    """Return whether `flag` is true in any process; asked on the CPU, without waiting for a device."""
    if not is_joined():
        return flag
    count = torch.tensor(int(flag))
    dist.all_reduce(count, group=_host_group())
    return count.item() > 0


def is_same(value):
    """Return whether a value, anything that can be pickled, is equal in all processes."""
    if not is_joined():
        return True
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_host_group())
    return all(each == value for each in values)


@functools.cache
def _host_group():
    """Return a group of all processes that communicates on the CPU."""
    # others wait where one machine reads its images, or the first process scores
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))


def share(rows):
    """Return this process's share of the rows of a batch, a tensor (b, ...): as equal as possible, or none of them."""
    return rows.tensor_split(dist.get_world_size())[dist.get_rank()] if is_joined() else rows


def reduce_gradients(loss, parameters, weight):
    """Return the loss of a whole batch, and give the parameters its gradients, from those of each process's share.

    loss: the mean over the share, a tensor () without a graph. weight: the part of the batch that the share is; with 0,
    loss and gradients do not count. Unlike DistributedDataParallel this allows shares of different sizes.
    """
    if not is_joined():
        return loss
    parameters = list(parameters)
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    flat = torch.cat([loss.view(1), *(gradient.flatten() for gradient in gradients)]).mul_(weight)
    dist.all_reduce(flat)
    loss, *parts = flat.split([1, *(gradient.numel() for gradient in gradients)])
    for parameter, gradient, part in zip(parameters, gradients, parts):
        parameter.grad = gradient.copy_(part.view(gradient.shape))  # in the gradient's own memory format
    return loss.view(())


def spread(parts, work, to_all=False):
    """Yield the results of `work` for all parts, in their order. The processes share the parts, whole ones.

    parts: a sequence. work: a function of some of the parts that yields a tuple of tensors for each of them; with
    several processes they come back on the CPU. to_all: every process is given the results; otherwise only the first,
    and the others none.
    """
    if not is_joined():
        yield from work(parts)
        return
    rank = dist.get_rank()
    world = dist.get_world_size()
    own = iter(work(parts[rank::world]))
    for start in range(0, len(parts), world):
        results = [None] * world if to_all or rank == 0 else None
        result = tuple(each.cpu() for each in next(own, ()))
        if to_all:
            dist.all_gather_object(results, result, group=_host_group())
        else:
            dist.gather_object(result, results, group=_host_group())
        yield from (results or [])[: len(parts) - start]


def gather(z):
    """Return (M, W b, D) from each process's (M, b, D), with the exact gradient.

    Every process then computes the loss of the whole batch. The backward pass adds the W equal gradients that reach a
    row, and DistributedDataParallel divides by W: what remains is the gradient of one process with the whole batch.
    """
    if not is_joined():
        return z
    places = z.new_zeros(dist.get_world_size(), *z.shape)  # each process fills its own; a sum puts them together
    places[dist.get_rank()] = z
    return _Sum.apply(places).transpose(0, 1).flatten(1, 2)


def wrap(net, device, compiled=False):
    """Return `net` with gradients averaged and batch statistics shared by the processes; with one process, `net`.

    compiled: whether to use torch.compile. It is applied inside DistributedDataParallel, which it does not handle well.
    The parameters are those of `net`.
    """
    if is_joined() and device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    elif is_joined():
        for layer in net.modules():  # torch's SyncBatchNorm refuses the CPU
            if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
                layer.__class__ = _GlobalBatchNorm
    if compiled:
        net = torch.compile(net)
    if not is_joined():
        return net
    cards = [device] if device.type == "cuda" else None
    # broadcast_buffers: the statistics of batch normalization are the same in all processes
    return nn.parallel.DistributedDataParallel(net, device_ids=cards, broadcast_buffers=False)


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)  # NCCL takes no other
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return _Sum.forward(ctx, gradient)


class _Normalize(torch.autograd.Function):
    """Batch normalization by the mean and variance of all processes, with its exact gradient.

    x: (B, C, ...), a process's share; statistics: (2, C), mean and variance of all shares; count: values of a channel
    in all shares. torch computes it in one pass, as it does for one process; only the sums of a channel are exchanged.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, statistics, count, eps):
        ctx.save_for_backward(x, weight, statistics)
        ctx.count = count
        ctx.eps = eps
        return F.batch_norm(x, *statistics, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, statistics = ctx.saved_tensors
        mean, variance = statistics

        # The gradient for statistics that do not depend on x.
        constant = (mean, variance, None, None, False, ctx.eps, [True, True, True])
        of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(gradient, x, weight, *constant)

        # What they add to it: a linear function of the normalized x, so a batch normalization, too.
        of_all = torch.stack([of_weight, of_bias])
        dist.all_reduce(of_all)
        slope, offset = of_all * weight * (variance + ctx.eps).rsqrt() / ctx.count
        of_x -= F.batch_norm(x, mean, variance, slope, offset, eps=ctx.eps)
        return of_x, of_weight, of_bias, None, None, None


class _GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization over the equal shares of all processes; its state is that of BatchNorm1d and 2d."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        count = x.numel() // x.shape[1]
        processes = dist.get_world_size()

        # Mean and variance of each process's share: those that momentum 1 puts in the place of the running ones.
        shares = self.running_mean.new_zeros(processes, 2, x.shape[1])
        mean, variance = shares[dist.get_rank()]
        F.batch_norm(x.detach(), mean, variance, training=True, momentum=1)
        variance *= (count - 1) / count  # torch's is that of a sample
        dist.all_reduce(shares)

        # Mean and variance of all.
        means, variances = shares.unbind(1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        count *= processes
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return _Normalize.apply(x, self.weight, self.bias, torch.stack([mean, variance]), count, self.eps)
