"""LARS against Google's update, AdamLARS, the parameter groups, the learning-rate schedule."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from Backbones import ContrastiveNet, build_encoder, build_head
from Optimizers import LARS, AdamLARS, build_optimizer, learning_rate, parameter_groups, set_learning_rate, trust_ratios

W0, B0, Z0 = [[0.5, -0.3, 0.8], [0.1, 0.9, -0.4]], [0.2, -0.1], [0.0, 0.0]
GRAD = [[0.02, -0.05, 0.01], [0.03, 0.04, -0.02]]


def tensors(*values):
    return [nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in values]


def three_steps(rates):
    w, b, z = tensors(W0, B0, Z0)
    groups = [
        {"params": [w], "weight_decay": 1e-2, "adapt": True},
        {"params": [b, z], "weight_decay": 0.0, "adapt": False},
    ]
    optimizer = LARS(groups, lr=rates[0], momentum=0.9, trust=1e-3)
    for k, rate in enumerate(rates, start=1):
        set_learning_rate(optimizer, rate)
        w.grad = k * torch.tensor(GRAD, dtype=torch.float64)
        b.grad = z.grad = k * torch.tensor([0.1, -0.2], dtype=torch.float64)
        optimizer.step()
    return w.detach(), b.detach(), z.detach()


def test_lars_gives_the_known_values_at_a_changing_rate():
    w, b, z = three_steps([0.6, 1.2, 0.9])
    golden = [0.49813832261356944, -0.2958263429694154, 0.7987909560020264]
    golden += [0.09753627200779591, 0.8963272280098223, -0.3981889053962528]
    assert w.flatten().tolist() == pytest.approx(golden, rel=1e-12)
    assert b.tolist() == pytest.approx([-0.6886, 1.6772], rel=1e-12)
    assert z.tolist() == pytest.approx([-0.8886, 1.7772], rel=1e-12)


def test_lars_gives_the_known_values_at_a_constant_rate():
    w, b, z = three_steps([0.6] * 3)
    golden = [0.49868817006297805, -0.29709222616714065, 0.7991288318153498]
    golden += [0.09828664525899558, 0.8974154770743451, -0.3987273070113671]
    assert w.flatten().tolist() == pytest.approx(golden, rel=1e-12)
    assert b.tolist() == pytest.approx([-0.3706, 1.0412], rel=1e-12)
    assert z.tolist() == pytest.approx([-0.5706, 1.1412], rel=1e-12)


def google(w, g, v, lr, wd, mu=0.9, eta=1e-3, nesterov=False):
    """google-research/simclr, tf2/lars_optimizer.py, in numpy."""
    g = g + wd * w
    wn, gn = np.linalg.norm(w), np.linalg.norm(g)
    r = eta * wn / gn if wn > 0 and gn > 0 else 1.0
    v = mu * v + lr * r * g
    return w - (mu * v + lr * r * g if nesterov else v), v


@pytest.mark.parametrize("wd", [0.0, 1e-2])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("start", [W0, [[0.0] * 3] * 2])
def test_lars_equals_google(wd, nesterov, start):
    rng = np.random.default_rng(0)
    (w,) = tensors(start)
    optimizer = LARS([w], lr=1.0, nesterov=nesterov, weight_decay=wd)
    reference, v = np.array(start), np.zeros((2, 3))
    for k in range(6):
        grad, lr = rng.normal(size=(2, 3)), 0.5 + 0.3 * k
        set_learning_rate(optimizer, lr)
        w.grad = torch.from_numpy(grad)
        optimizer.step()
        reference, v = google(reference, grad, v, lr, wd, nesterov=nesterov)
    np.testing.assert_allclose(w.detach(), reference, rtol=1e-12)
    assert np.abs(reference - np.array(start)).max() > 1e-5  # it moved, also from zero


def test_adam_lars_moves_a_layer_by_lr_trust_times_its_norm():
    w, still = tensors(W0, [1.0])
    plain = w.detach().clone().requires_grad_()
    layered = AdamLARS([w, still], lr=0.1, trust=0.02)
    adam = torch.optim.Adam([plain], lr=0.1)
    w.grad = plain.grad = torch.tensor(GRAD, dtype=torch.float64)
    layered.step()
    adam.step()
    (start,) = tensors(W0)
    step, direction = (w - start).detach(), (plain - start).detach()
    assert step.norm().item() == pytest.approx(0.1 * 0.02 * np.linalg.norm(W0), rel=1e-6)
    assert torch.cosine_similarity(step.flatten(), direction.flatten(), 0).item() == pytest.approx(1, abs=1e-9)
    assert still.item() == 1.0  # no gradient, no move


def test_adam_lars_leaves_biases_to_adam():
    w, b = tensors(W0, B0)
    plain = b.detach().clone().requires_grad_()
    groups = [{"params": [w], "adapt": True}, {"params": [b], "adapt": False}]
    layered = AdamLARS(groups, lr=0.1, trust=0.02)
    adam = torch.optim.Adam([plain], lr=0.1)
    w.grad = torch.tensor(GRAD, dtype=torch.float64)
    b.grad = plain.grad = torch.tensor([0.1, -0.2], dtype=torch.float64)
    layered.step()
    adam.step()
    torch.testing.assert_close(b, plain)


@pytest.mark.parametrize("lars", [False, True])
def test_the_momentum_is_that_of_the_flag(lars):
    (group,) = build_optimizer("SGD", [{"params": tensors(W0)}], 0.1, 0.8, lars).param_groups
    assert (group["momentum"], group["nesterov"]) == (0.8, True)
    (group,) = build_optimizer("Adam", [{"params": tensors(W0)}], 0.1, 0.8, lars).param_groups
    assert group["betas"] == (0.8, 0.999)


def test_trust_ratio_is_one_where_a_norm_is_zero():
    zero, one = torch.zeros(3), torch.ones(3)
    ratios = trust_ratios([zero, one, one], [one, zero, 2 * one], 0.01)
    assert [float(ratio) for ratio in ratios] == pytest.approx([1, 1, 0.005])


@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("lars", [False, True])
def test_every_combination_learns_and_its_state_round_trips(name, lars):
    def build():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        return net, build_optimizer(name, parameter_groups(net, 1e-4), 0.05, 0.9, lars, trust=0.1)

    def steps(net, optimizer, count):
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
        for _ in range(count):
            loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    net, optimizer = build()
    first = steps(net, optimizer, 1)
    assert steps(net, optimizer, 59) < 0.7 * first
    copy, resumed = build()
    copy.load_state_dict(net.state_dict())
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))  # it shares its tensors otherwise
    assert steps(net, optimizer, 3) == steps(copy, resumed, 3)


def test_groups_are_by_module_type():
    encoder = build_encoder("resnet18", small_stem=True, size=32)
    net = ContrastiveNet(encoder, build_head(encoder.num_features, 64, 16))
    weights, others = parameter_groups(net, 1e-4)
    assert weights["weight_decay"] == 1e-4
    assert weights["adapt"]
    assert others["weight_decay"] == 0
    assert not others["adapt"]
    assert all(p.ndim > 1 for p in weights["params"])
    assert all(p.ndim == 1 for p in others["params"])
    assert len(weights["params"]) + len(others["params"]) == len(list(net.parameters()))


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.InstanceNorm1d(4, affine=True)],
)
def test_norm_layers_of_every_kind_are_not_decayed(norm):
    weights, others = parameter_groups(nn.Sequential(nn.Linear(4, 4), norm), 1e-4)
    assert len(weights["params"]) == 1
    assert {id(p) for p in norm.parameters()} < {id(p) for p in others["params"]}


def test_the_rate_rises_linearly_then_falls_as_a_cosine_to_zero():
    assert learning_rate(1, 10, 0, 1.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 9)))  # lightly's CosineWarmup
    rates = [learning_rate(step, 100, 20, 0.4) for step in range(100)]
    assert rates[0] == pytest.approx(0.4 / 20)
    assert rates[19] == rates[20] == pytest.approx(0.4)
    assert rates[-1] == 0
    assert min(rates[:-1]) > 0
    assert all(np.diff(rates[:20]) > 0)
    assert all(np.diff(rates[20:]) < 0)
    assert learning_rate(0, 1, 0, 1.0) == 1.0  # a single update has the full rate


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="--opt Lion"):
        build_optimizer("Lion", [], 0.1)
