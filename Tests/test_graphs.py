"""CUDA graphs without a GPU: a stand-in that computes again what was captured. test_cuda.py has the real ones."""

import contextlib

import pytest
import torch

import Distributed
import Graphs


class Stand:
    """Takes the place of torch.cuda: remembers which graph is captured."""

    def __init__(self, monkeypatch, error=None):
        self.error = error
        self.captured = 0
        self.device_index = 0
        self.left = []  # what the end of a failed capture has set
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self)
        monkeypatch.setattr(torch.cuda, "set_stream", self.left.append)
        monkeypatch.setattr(torch.cuda, "default_generators", (self,))
        monkeypatch.setattr(torch.cuda, "Stream", lambda: self)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    @contextlib.contextmanager
    def capture(self, graph, capture_error_mode):
        assert capture_error_mode == "thread_local"
        try:
            yield
            if self.error:
                raise self.error
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture") from None
        self.captured += 1

    def clone_state(self):
        return "another state"

    def graphsafe_set_state(self, state):
        self.left.append(state)

    def wait_stream(self, stream):
        pass

    def replay(self):
        """Compute what the graph holds, from its inputs, into its outputs and gradients."""
        weight = self.graphed.parameters[0]
        kept = [*self.graphed.outputs, *self.graphed.gradients]
        outputs = self.graphed._compute(self.graphed.inputs)
        for place, value in zip(kept, [*outputs, weight.grad]):
            place.copy_(value)


@pytest.fixture
def weight():
    return torch.nn.Parameter(torch.ones(3))


def graphed_loss(weight):
    """A loss of a tensor and of tensors in lists: sum of weight * x * scale ** 2."""

    def loss_of(x, nested):
        [[scale], [power]] = nested
        product = weight * x
        return ((product * scale**power).sum(), product)

    return Graphs.GraphedLoss(loss_of, [weight])


def inputs(index):
    return torch.arange(3.0) + index, [[torch.tensor(2.0)], [torch.tensor(float(index % 3))]]


def test_a_graph_takes_each_calls_inputs_and_sets_the_gradients(monkeypatch, weight):
    stand = Stand(monkeypatch)
    graphed = graphed_loss(weight)
    stand.graphed = graphed
    for index in range(3 * Graphs.WARM_UP):
        weight.grad = None  # another loss may have been computed between two calls
        x, nested = inputs(index)
        loss, product = graphed(x, nested)
        scale = 2.0 ** (index % 3)
        assert loss.item() == x.sum().item() * scale
        assert torch.equal(product, x)
        assert torch.equal(weight.grad, x * scale)
        assert not loss.requires_grad
        assert not product.requires_grad
    assert stand.captured == 1


def test_what_cannot_be_captured_is_computed_without_a_graph(monkeypatch, weight, capsys):
    stand = Stand(monkeypatch, error=RuntimeError("operation not permitted when stream is capturing\nand more"))
    graphed = graphed_loss(weight)
    for index in range(3 * Graphs.WARM_UP):
        x, nested = inputs(index)
        loss, _ = graphed(x, nested)
        assert loss.item() == x.sum().item() * 2.0 ** (index % 3)
    (line,) = capsys.readouterr().err.splitlines()
    assert "no CUDA graph: operation not permitted when stream is capturing" in line
    assert stand.left == [stand, "another state"]  # the stream of before, and a generator that is not captured
    assert graphed.inputs is None


def test_a_graph_is_for_one_process_on_a_gpu(monkeypatch):
    cuda = torch.device("cuda")
    assert Graphs.can_capture(True, cuda)
    assert not Graphs.can_capture(False, cuda)
    assert not Graphs.can_capture(True, torch.device("cpu"))
    monkeypatch.setattr(Distributed, "is_joined", lambda: True)  # by torchrun, also as the only one
    assert not Graphs.can_capture(True, cuda)
