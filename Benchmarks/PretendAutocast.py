"""torch.autocast("cuda") on the pretend device of PretendDevice.py: it casts what CUDA's does, by torch's own lists."""

import contextlib
import re
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch.utils._pytree import tree_flatten, tree_map

_NOT_IN_LISTS = torch.library.Library("_", "IMPL")  # kept alive: operations that autocast leaves as they are
_NOT_IN_LISTS.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


def _cuda_lists():
    """Return [(policy, operation, overload)] of CUDA's autocast, read from the header that torch brings."""
    header = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()
    rows = []
    for policy in ("LOWER_PRECISION_FP", "FP32", "FP32_SET_OPT_DTYPE", "PROMOTE"):
        body = re.search(rf"define AT_FORALL_{policy}\(_\)((?:.*\\\n)+.*)", header)[1]
        rows += [(policy, *names) for names in re.findall(r"_\((\w+)(?:, (\w+))?\)", body)]
    return rows


@contextlib.contextmanager
def autocast_as_cuda():
    """Make torch.autocast("cuda") cast on the pretend device what it casts on CUDA."""
    library = torch.library.Library("aten", "IMPL")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    weights = {}  # {id of a weight: (the weight, its cast)}, each cast once, until the outermost autocast ends
    clear = torch.clear_autocast_cache

    class Autocast(torch.amp.autocast_mode.autocast):
        def __init__(self, device_type, *args, **kwargs):
            super().__init__("pretend" if device_type == "cuda" else device_type, *args, **kwargs)

    def clear_both():
        weights.clear()
        clear()

    def eligible(x):
        return isinstance(x, torch.Tensor) and x.is_cuda and x.is_floating_point() and x.dtype != torch.float64

    def cast(x, dtype):
        if not eligible(x) or x.dtype == dtype:
            return x
        if dtype == torch.float32 or not (x.requires_grad and x.is_leaf and torch.is_autocast_cache_enabled()):
            return x.to(dtype)
        if id(x) not in weights:
            weights[id(x)] = x, x.to(dtype)
        return weights[id(x)][1]

    def kernel(policy, op, *args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(keys):
            leaves = tree_flatten((args, kwargs))[0]
            wide = policy == "PROMOTE" and any(eligible(x) and x.dtype == torch.float32 for x in leaves)
            dtype = torch.float32 if wide or policy.startswith("FP32") else torch.get_autocast_dtype("pretend")
            args, kwargs = tree_map(lambda x: cast(x, dtype), (args, kwargs))
            return op(*args, **kwargs)

    for policy, name, overload in _cuda_lists():
        overload = "" if overload in ("deprecated", "input") else overload
        with contextlib.suppress(AttributeError, RuntimeError):  # an overload that torch has no operation for
            op = getattr(getattr(torch.ops.aten, name), overload or "default")
            library.impl(f"{name}.{overload}".rstrip("."), partial(kernel, policy, op), "AutocastPrivateUse1")
    try:
        with mock.patch.multiple(torch, autocast=Autocast, clear_autocast_cache=clear_both):
            yield
    finally:
        library._destroy()
