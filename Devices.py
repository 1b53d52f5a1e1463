"""Devices: which one is used, its random states, number formats and memory."""

import os
import re
import resource
import sys
from pathlib import Path

import torch

import Distributed
from Utils import UserError


def pick_device(name):
    """Return the torch device of --device. Raises UserError if it is not available."""
    if name == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        device = _device_of(name)
    if device.type == "cuda":
        _check_index(name, device, torch.cuda.device_count())
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


def free_memory(device):
    """Return the bytes that are free on a device."""
    device = torch.device(device)
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch keeps what was freed
        return torch.cuda.mem_get_info(device)[0] + cached
    try:  # memory available without swapping, page cache included: it can be full of a bank that was just written
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # macOS: all of its memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory(device):
    """Return the most bytes that this process has held: on the GPU, or of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
    """Return whether a bank is held on the device: --bank_storage memory, or auto where it fits."""
    return storage == "memory" or (storage == "auto" and has_room(n_bytes, device))
