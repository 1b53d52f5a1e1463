"""A CUDA device without a GPU: tensors say "cuda", their numbers are on the CPU, and what a GPU would do is counted.

    with PretendCuda() as gpu:
        net = net.to("cuda")
        loss = net(images.to("cuda", non_blocking=True)).mean()
        loss.backward()
    print(gpu.report())

A program runs unchanged: `device.type == "cuda"` holds, torch.cuda answers, autocast casts what CUDA's does. What fails
on a GPU fails here: tensors of CPU and device in one operation, `.numpy()` of a device tensor. Counted, each with the
line of the program that caused it:

    kernels          operations that a GPU would be sent: no views, no empty tensors (some are several kernels there)
    pinned copies    copies from pinned memory of the host
    pageable copies  other copies from the host, which can make it wait even if non_blocking
    waits            what makes the host wait: .item(), bool(), .cpu(), .nonzero(), masks as indices, blocking copies

PrivateUse1, torch's dispatch key for other devices, gets a backend in Python. `DeviceTensor` wraps a CPU tensor; every
operation on one goes through `PretendCuda.run`. `_Translate` replaces "cuda" by this device in the calls of torch.
To import this file changes torch: do it in a process that needs no real GPU.
"""

import contextlib
import functools
import re
import time
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from Benchmarks.PretendAutocast import autocast_as_cuda

KINDS = ("kernels", "pinned copies", "pageable copies", "waits")


class _Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


PRETEND = torch.device("privateuseone", 0)


@functools.cache
def _register():
    """Give torch the device. From then on, a process that has computed gradients cannot fork."""
    backend_registration._setup_privateuseone_for_python_backend("pretend", backend_module=_Backend())


def _operations(names):
    return re.compile(rf"aten\.({'|'.join(names.split())})\b")


# Besides views: operations without a kernel.
FREE = _operations(
    "_unsafe_view _reshape_alias lift_fresh detach alias set_ resize_ is_same_size record_stream "
    "empty new_empty empty_like empty_strided new_empty_strided"
)
# Operations whose result, or its size, the host must know.
WAITS = _operations(
    "_local_scalar_dense item is_nonzero equal nonzero argwhere masked_select bincount histc "
    "_unique2? unique_dim unique_consecutive repeat_interleave"
)
# Operations that the CPU is slow at in bfloat16: done in float32 and rounded, as on a GPU, which sums in float32.
PRODUCTS = _operations("convolution convolution_backward mm addmm bmm baddbmm")
INDEXING = _operations("_unsafe_index index index_put_? _index_put_impl_ _unsafe_index_put")


class DeviceTensor(torch.Tensor):
    """A tensor on the pretend device. numbers: the CPU tensor that holds its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers):
        layout = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset(), "dtype": numbers.dtype}
        self = torch.Tensor._make_wrapper_subclass(cls, numbers.size(), device=PRETEND, **layout)
        self.numbers = numbers
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return PretendCuda.active.run(func, args, kwargs or {})

    device = property(lambda self: torch.device("cuda", 0))
    is_cuda = property(lambda self: True)

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __repr__(self):
        return f"DeviceTensor({self.numbers})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = self.detach().clone().requires_grad_(self.requires_grad)
            vars(copy).update({name: value for name, value in vars(self).items() if name != "numbers"})  # as _is_param
            memo[id(self)] = copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        """Pickle the numbers, as torch.load(..., map_location="cpu") reads a CUDA tensor."""
        PretendCuda.active.note("waits", "device to host, to be pickled")
        return self.numbers.detach().requires_grad_(self.requires_grad).__reduce_ex__(protocol)


class PretendCuda(TorchDispatchMode):
    """The device, present inside `with`. root: folder whose lines are named. free_memory: bytes, for mem_get_info."""

    active = None

    def __init__(self, root=None, free_memory=80 * 2**30):
        super().__init__()
        _register()
        self.root = str(root or Path.cwd())
        self.free_memory = free_memory
        self.reset()

    def reset(self):
        """Set all counts to zero."""
        self.lines = {kind: Counter() for kind in KINDS}  # of (line, what)
        self.copied_bytes = 0  # from the host
        self.touched_bytes = 0  # by kernels, each operand once; divided by the bandwidth, the least time on a GPU

    def count(self, kind):
        """Return the number of KINDS' events since the last reset."""
        return self.lines[kind].total()

    def report(self):
        """Return the counts as text, with all lines that copied or waited."""
        counts = ", ".join(f"{self.count(kind)} {kind}" for kind in KINDS)
        text = [f"{counts}; {self.copied_bytes:,} bytes copied, {self.touched_bytes:,} touched"]
        for kind in KINDS[1:]:
            for (line, what), count in self.lines[kind].most_common():
                text.append(f"  {count} {kind}: {line}: {what}")
        return "\n".join(text)

    def note(self, kind, what):
        """Count an event under the innermost line of the program; a backward pass has none."""
        for frame, number in traceback.walk_stack(None):
            file = frame.f_code.co_filename
            if file.startswith(self.root) and "site-packages" not in file and "Benchmarks/Pretend" not in file:
                self.lines[kind][f"{file[len(self.root) + 1 :]}:{number}", what] += 1
                return
        self.lines[kind]["(backward)", what] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        """Return what an operation gives, done on the numbers; count it, or raise as CUDA would."""
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
        target = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
        if not there and target != PRETEND:
            return func(*args, **kwargs)  # on the CPU
        composite = torch._C.DispatchKey.CompositeImplicitAutograd
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), composite):
            # autograd takes these operations apart, but not for tensors that were made in inference mode
            super().__enter__()  # what it is made of comes here, too
            try:
                return func._op_dk(composite, *args, **kwargs)
            finally:
                super().__exit__(None, None, None)
        name = str(func)
        self.check(func, name, args, kwargs, tensors)

        # Do it on the CPU.
        numbers = [_to_numbers(leaf) for leaf in leaves]
        rounded = PRODUCTS.match(name) and torch.bfloat16 in [tensor.dtype for tensor in tensors]
        cpu_args, cpu_kwargs = tree_unflatten(_to_dtype(numbers, torch.float32) if rounded else numbers, spec)
        out = func(*cpu_args, **cpu_kwargs)
        out = _to_dtype(out, torch.bfloat16) if rounded else out

        # Count it: a copy to the device, a copy to the host, or a kernel.
        in_place = name.startswith("aten.copy_")
        moves = in_place or name.startswith("aten._to_copy")
        source = args[1] if in_place else next(iter(tensors), None)
        to_device = isinstance(args[0], DeviceTensor) if in_place else target in (None, PRETEND)
        if moves and to_device and not isinstance(source, DeviceTensor):
            self.send(source, args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        elif moves and not to_device:
            self.note("waits", "device to host")
            return args[0] if in_place else out
        elif not func.is_view and not FREE.match(name):
            self.note("kernels", name.removeprefix("aten."))
            touched = [*numbers, *tree_flatten(out)[0]]
            self.touched_bytes += sum(each.nbytes for each in touched if isinstance(each, torch.Tensor))

        # Put the results on the device, views as views of what they show.
        normal = func.is_view and there and not there[0].is_inference()  # in inference mode, views of others are normal
        with torch.inference_mode(False) if normal else contextlib.nullcontext():
            out = tree_map(lambda each: DeviceTensor(each) if isinstance(each, torch.Tensor) else each, out)
        return return_and_correct_aliasing(func, args, kwargs, out) if there else out

    def send(self, source, non_blocking):
        """Count a copy from the host, and a wait for one that blocks."""
        kind = "pinned copies" if getattr(source, "is_pretend_pinned", False) else "pageable copies"
        self.note(kind, f"{source.dtype} {tuple(source.shape)}")
        self.copied_bytes += source.nbytes
        if not non_blocking:
            self.note("waits", "blocking copy to the device")

    def check(self, func, name, args, kwargs, tensors):
        """Raise where CUDA would, and count an operation that waits."""
        on_host = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
        if name.startswith(("aten._to_copy", "aten.copy_")):
            return
        if INDEXING.match(name):
            for index in [each for each in args[1] if each is not None]:
                if index.dtype in (torch.bool, torch.uint8):
                    self.note("waits", "a mask as an index")
                if not isinstance(index, DeviceTensor) and isinstance(args[0], DeviceTensor):
                    self.send(index, non_blocking=False)  # torch moves it
                    on_host = [tensor for tensor in on_host if tensor is not index]
        if torch.Tag.pointwise in func.tags or INDEXING.match(name) or re.search("masked_fill|where", name):
            on_host = [tensor for tensor in on_host if tensor.ndim]  # one without dimensions stands for a number
        if on_host:
            places = [f"{'cuda' if isinstance(x, DeviceTensor) else 'cpu'} {tuple(x.shape)}" for x in tensors]
            raise RuntimeError(f"Expected all tensors to be on the same device: {name} of {', '.join(places)}")
        if WAITS.match(name) and "output_size" not in kwargs:
            self.note("waits", name.removeprefix("aten."))

    def __enter__(self):
        PretendCuda.active = self
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(mock.patch.multiple(torch.cuda, **_answers(self)))
        self.stack.enter_context(autocast_as_cuda())
        # torch.tensor(x, device="cuda") is then made on the CPU and sent, as CUDA does
        self.stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        self.stack.enter_context(_Translate())
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.stack.close()


def _to_numbers(leaf):
    if isinstance(leaf, torch.device) and leaf == PRETEND:
        return torch.device("cpu")
    return leaf.numbers if isinstance(leaf, DeviceTensor) else leaf


def _to_dtype(nest, dtype):
    return tree_map(lambda leaf: leaf.to(dtype) if isinstance(leaf, torch.Tensor) else leaf, nest)


class _Translate(TorchFunctionMode):
    """Replaces "cuda" by the pretend device in all calls of torch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        if func is torch.Tensor.cuda:
            return args[0].to(PRETEND, non_blocking=kwargs.get("non_blocking", False))
        if func is torch.Tensor.pin_memory:
            pinned = args[0].clone()
            pinned.is_pretend_pinned = True
            return pinned
        if func is torch._weight_norm and isinstance(args[0], DeviceTensor):  # CUDA's way, which torch takes by is_cuda
            return torch._weight_norm_interface(args[0].contiguous(), args[1].contiguous(), *args[2:])[0]
        args = [PRETEND if _is_cuda(arg) else arg for arg in args]
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = PRETEND
        return func(*args, **kwargs)


def _is_cuda(place):
    return isinstance(place, (torch.device, str)) and str(place).split(":")[0] == "cuda"


class _Event:
    def record(self, stream=None):
        self.time = time.perf_counter()

    def synchronize(self):
        PretendCuda.active.note("waits", "Event.synchronize")

    def elapsed_time(self, other):
        return 1000 * (other.time - self.time)


def _answers(gpu):
    """Return what replaces the functions of torch.cuda."""
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        "get_device_name": lambda device=None: "pretend",
        "mem_get_info": lambda device=None: (gpu.free_memory, gpu.free_memory),
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "current_stream": lambda device=None: None,
        "set_device": lambda device: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "synchronize": lambda device=None: gpu.note("waits", "synchronize"),
        "Event": lambda **_: _Event(),
    }
