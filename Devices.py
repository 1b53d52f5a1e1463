"""Devices: which one is used, its random states, number formats and memory."""

import gc
import os
import re
import resource
import sys
from pathlib import Path

import torch

import Distributed
from Utils import UserError, first_line


def pick_device(name):
    """Return the torch device of --device. Raises UserError if it is not available."""
    if name == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        device = _device_of(name)
    if device.type == "cuda":
        _check_index(name, device, torch.cuda.device_count())
        # losses and probes are float32; a variable in NVIDIA's containers would make their products tf32
        torch.backends.cuda.matmul.allow_tf32 = False
    return device


def _device_of(name):
    """Return the torch device of a name. Raises UserError if it is not available."""
    try:
        device = torch.device(name)
        if device.type != "cuda" or not torch.cuda.is_available():  # this would take memory of the first GPU
            torch.empty(1, device=device).item()  # the meta device has no numbers
    except (RuntimeError, AssertionError) as error:
        # the first sentence; a list of kinds of devices, or advice, follows
        reason = re.split(r"\. |\n|Expected one of", str(error))[0].strip()
        raise UserError(f"--device {name}: {reason or 'torch has no such device'}: try --device auto") from error
    return device


def _check_index(name, device, count):
    """Raise UserError if this process's GPU is none of the `count` that there are."""
    if Distributed.is_launched():
        if Distributed.local_rank() >= count:
            remedy = f"give torchrun --nproc_per_node={count}, or this script --device cpu"
            raise UserError(f"--device {name}: more processes than this machine has GPUs ({count}): {remedy}")
    elif (device.index or 0) >= count:
        raise UserError(f"--device {name}: the GPUs are cuda:0 to cuda:{count - 1}: name one of them, or --device auto")


def random_states(device):
    """Return the states of torch's random numbers on the CPU and, if that is another one, on the device."""
    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(device, states):
    """Continue from `random_states`; those of a device that they were not taken on stay as they are."""
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def set_precision(name, device):
    """Return whether --precision `name` means bf16 on the device, and set whether cuDNN uses tf32."""
    torch.backends.cudnn.allow_tf32 = name != "fp32"
    if name != "auto":
        return name == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def autocast(device, bf16):
    """Return the context in which a net computes in bf16, or, without bf16, in its own number format."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def precision_name(name, bf16, device):
    """Return the number format that --precision `name` led to on a device, in words."""
    if bf16:
        return "bf16"
    return "tf32" if name != "fp32" and device.type == "cuda" else "fp32"


def free_memory(device, root="/"):
    """Return the bytes that are free on a device. Main memory: no more than a container or a job's limit leaves.

    root: where /proc and /sys are looked for.
    """
    device = torch.device(device)
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch keeps what was freed
        return torch.cuda.mem_get_info(device)[0] + cached
    try:  # memory available without swapping, page cache included: it can be full of a bank that was just written
        lines = Path(root, "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # macOS: all of its memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *_left_by_limits(Path(root))])


LIMITS = {  # version of control groups: their folder, and the files of the limit and of what is used
    2: ("sys/fs/cgroup", "memory.max", "memory.current"),
    1: ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}


def _left_by_limits(root):
    """Return the bytes that each memory limit on this process leaves (Linux control groups), page cache included."""
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    left = []
    for number, controllers, group in groups:
        version = 2 if number == "0" else 1
        if version == 1 and "memory" not in controllers.split(","):
            continue
        place, limit_name, used_name = LIMITS[version]
        top = root / place
        folder = top / group.lstrip("/")
        for each in (folder, *folder.parents):  # the limit of a group holds for those in it
            limit = first_line(each / limit_name)
            used = first_line(each / used_name)
            if limit.isdigit() and used.isdigit():
                left.append(max(0, int(limit) - int(used) + _page_cache(each)))
            if each == top:
                break
    return left


def _page_cache(group):
    """Return the bytes of files that the kernel keeps for a control group, and gives up when memory is needed."""
    try:
        words = [line.split() for line in (group / "memory.stat").read_text().splitlines()]
    except OSError:
        return 0
    amounts = {name: int(amount) for name, amount in words}
    total = "total_" if "total_inactive_file" in amounts else ""  # version 1 counts the groups inside apart
    return amounts.get(f"{total}inactive_file", 0) + amounts.get(f"{total}active_file", 0)


def wait(device):
    """Wait for what a GPU still has to do, which the host has only launched; on other devices nothing is left."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device):
    """Return the most bytes that this process has held: on the GPU, or of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak(device):
    """Let `peak_memory` of a GPU begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def release(device):
    """Give back what torch keeps of a GPU's memory for later, after objects that refer to each other are gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_room(n_bytes, device, what):
    """Raise UserError if that many bytes, of `what` in words, are more than is free on a device."""
    free = free_memory(device)
    if n_bytes > free:
        needed = f"{what} would take {n_bytes / 2**30:,.0f} GiB of memory"
        raise UserError(f"{needed}, and {free / 2**30:,.0f} GiB are free on {device}: lower it")


def has_room(n_bytes, device):
    """Return whether that many bytes take at most half of what is free on a device."""
    return n_bytes <= free_memory(device) / 2


def is_held(storage, n_bytes, device):
    """Return whether a bank is held on the device: --bank_storage memory, or auto where it fits.

    On CPUs each process of this machine holds one.
    """
    copies = Distributed.local_count() if torch.device(device).type == "cpu" else 1
    return storage == "memory" or (storage == "auto" and has_room(copies * n_bytes, device))
