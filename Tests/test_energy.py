"""The energy score against loops, and that a generator which minimizes it learns the spread of the targets."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from CamNet import Energy
from CamNet.Corruptions import pyramid
from CamNet.Distances import Patches, Pixels
from CamNet.Generator import Generator
from Images import Shapes


@pytest.fixture(scope="module")
def at():
    """Four images of 16 pixels and what a step is given for them."""
    torch.manual_seed(0)
    generator = Generator("tiny", 16, "gray")
    images = Shapes.draw(torch.arange(4), 16, torch.Generator().manual_seed(0))
    keys = Energy.make_pairs(0, 3, torch.tensor([5, 0, 9, 2]))
    condition = generator.corruption(images)
    return SimpleNamespace(generator=generator, images=images, keys=keys, condition=condition)


@pytest.mark.parametrize("distance", [Patches(), Pixels()])
def test_the_loss_equals_a_slow_one(at, distance):
    targets = pyramid(at.images, at.generator.sides)
    wanted = [distance.features(each) for each in targets]
    found = Energy.loss(at.generator, distance, at.condition, wanted, at.generator.codes(at.keys))
    slow = 0.0
    for image in range(4):
        condition = at.condition[image : image + 1]
        first = at.generator(condition, at.generator.codes(at.keys[image : image + 1]))
        second = at.generator(condition, at.generator.codes(at.keys[4 + image : 5 + image]))
        for one, other, target in zip(first, second, targets):
            x = target[image : image + 1]
            near = (distance(one, x) + distance(other, x)) / 2
            slow += (near - distance(one, other) / 2).item() / 4
    assert found.item() == pytest.approx(slow, rel=1e-5)


def test_every_sample_has_its_own_code():
    rows = torch.arange(50)
    keys = torch.cat([Energy.make_pairs(seed, step, rows) for seed in (0, 1) for step in (0, 1)])
    assert len(keys.unique()) == 400
    one_by_one = [Energy.make_pairs(1, 1, rows[i : i + 1]) for i in range(50)]  # other images have no effect
    assert torch.equal(keys[-100:], torch.stack(one_by_one, dim=1).flatten())


class Plain(nn.Module):
    """A generator of images of one brightness: center + spread * (normal number)."""

    def __init__(self):
        super().__init__()
        self.center = nn.Parameter(torch.tensor(0.3))
        self.spread = nn.Parameter(torch.tensor(0.3))

    def forward(self, condition, codes):
        return [(self.center + self.spread * codes).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)]


def test_a_generator_learns_the_distribution():
    generator = Plain()
    distance = Patches()
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(generator.parameters(), 0.01)
    for _ in range(300):
        targets = (0.5 + 0.1 * torch.randn(256, 1, 1, 1, generator=rng)).expand(-1, 3, 4, 4)
        codes = torch.randn(512, generator=rng)
        loss = Energy.loss(generator, distance, targets, [distance.features(targets)], codes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert generator.center.item() == pytest.approx(0.5, abs=0.02)
    assert abs(generator.spread.item()) == pytest.approx(0.1, rel=0.15)
