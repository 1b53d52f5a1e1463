"""Launch what a training step computes on a GPU as a whole: a CUDA graph.

A step of a small net is hundreds or thousands of kernels, and the host can take longer to launch them one by one than
the GPU takes to compute them. A graph is captured once and then launched whole. It holds the same kernels in the same
order, so the results have the same bits.
"""

import gc

import torch

import Distributed

WARM_UP = 3  # calls before the capture: libraries load their kernels and take their memory


def can_capture(wanted, device):
    """Return whether a step is captured: --cuda_graph, on a GPU, without torchrun (no step waits for others)."""
    return wanted and device.type == "cuda" and not Distributed.is_joined()


class GraphedLoss:
    """A loss and its gradients, for inputs whose shapes never change.

    loss: (*inputs) -> tuple of tensors, the first of which is the loss. Inputs are tensors, or lists of any depth of
    tensors. It must not wait for the device. Only the values of inputs and parameters may change from call to call.
    parameters: those that get gradients.
    """

    def __init__(self, loss, parameters):
        self.loss = loss
        self.parameters = list(parameters)
        self.calls = 0
        self.graph = None  # before the capture; False: the step cannot be captured
        self.stream = None  # of the calls before the capture
        self.inputs = None  # what the graph reads
        self.outputs = None  # what it writes
        self.gradients = None

    def __call__(self, *inputs):
        """Set .grad of the parameters; return what `loss` returns, detached. The next call overwrites all of them."""
        self.calls += 1
        if self.graph is None and self.calls > WARM_UP:
            self._capture(inputs)
        if self.graph is False:
            return self._compute(inputs)
        if self.graph is None:
            return self._compute_aside(inputs)
        torch._foreach_copy_(_tensors_of(self.inputs), _tensors_of(inputs))
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients):
            parameter.grad = gradient
        return self.outputs

    def _compute(self, inputs):
        for parameter in self.parameters:
            parameter.grad = None
        outputs = self.loss(*inputs)
        outputs[0].backward()
        return tuple(each.detach() for each in outputs)

    def _compute_aside(self, inputs):
        """Return _compute(inputs) from another stream, as a capture must not depend on what the default stream does."""
        here = torch.cuda.current_stream()
        self.stream = self.stream or torch.cuda.Stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            outputs = self._compute(inputs)
        here.wait_stream(self.stream)
        return outputs

    def _capture(self, inputs):
        """Make the graph; nothing is computed yet. Where that fails, say so once and go on without one."""
        gc.collect()  # the memory of an older graph
        self.inputs = _clone(inputs)
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            # thread_local: other threads can go on, such as the one that copies images into pinned memory
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.outputs = self._compute(self.inputs)
        except RuntimeError as error:  # what the net does cannot be captured, or memory ran out
            reason = str(error.__context__ or error).strip().splitlines()[0]  # the end of the capture fails as well
            Distributed.notice(f"no CUDA graph: {reason[:200]}: going on without one")
            _leave_capture(stream)
            self.graph = False
            self.inputs = None
            self.outputs = None
            for parameter in self.parameters:
                parameter.grad = None
            return
        self.gradients = [parameter.grad for parameter in self.parameters]
        self.graph = graph


def _leave_capture(stream):
    """Undo what a capture that has failed leaves behind. stream: the one before it.

    The capture's stream is still the current one, and the generator of random numbers takes itself for captured.
    """
    torch.cuda.set_stream(stream)
    generator = torch.cuda.default_generators[stream.device_index]
    generator.graphsafe_set_state(generator.clone_state())  # the clone is not captured


def _tensors_of(nest):
    """Return the tensors in lists of any depth, in their order."""
    if isinstance(nest, torch.Tensor):
        return [nest]
    return [tensor for part in nest for tensor in _tensors_of(part)]


def _clone(nest):
    """Return lists of any depth with a copy of each tensor."""
    return nest.clone() if isinstance(nest, torch.Tensor) else [_clone(part) for part in nest]
