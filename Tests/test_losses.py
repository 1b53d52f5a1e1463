"""The losses against golden values, a slow reference with loops, closed forms and their gradients."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import Losses
from Losses import FORMS, contrastive, multi_positive, nt_xent, view_statistics

Z = np.sin(1 + 3 * np.arange(8)[:, None] + 0.7 * np.arange(6)[None])  # rows 0-3 view A, 4-7 view B
Z3 = np.sin(1 + 3 * np.arange(12)[:, None] + 0.7 * np.arange(6)[None])


def slow(views, temperature, form):
    """Khosla et al. 2020, eq. 2 (out) and its sum inside the logarithm (in), one pair at a time in plain floats."""
    z = [(v / v.norm()).tolist() for view in views.double() for v in view]
    n, m, total = views.shape[1], len(views), 0.0
    for a in range(m * n):
        e = [math.exp(sum(p * q for p, q in zip(z[a], z[k])) / temperature) for k in range(m * n)]
        everything = sum(e) - e[a]
        positives = [e[k] for k in range(m * n) if k != a and k % n == a % n]
        if form == "out":
            total -= sum(math.log(p / everything) for p in positives) / len(positives)
        else:
            total -= math.log(sum(positives) / everything)
    return total / (m * n)


@pytest.mark.parametrize("temperature, golden", [(0.1, 1.785588598721893), (0.5, 1.2168339291436387)])
def test_nt_xent_golden(temperature, golden):
    z = torch.from_numpy(Z)
    assert nt_xent(z[:4], z[4:], temperature).item() == pytest.approx(golden, rel=1e-12)


@pytest.mark.parametrize(
    "form, temperature, golden",
    [
        ("out", 0.1, 3.8229561651747037),
        ("out", 0.5, 1.9120400130433657),
        ("in", 0.1, 1.8788326602975776),
        ("in", 0.5, 1.1352489668024008),
    ],
)
def test_three_views_golden(form, temperature, golden):
    z = torch.from_numpy(Z3).view(3, 4, 6)
    assert multi_positive(z, temperature, form).item() == pytest.approx(golden, rel=1e-12)


def test_gradient_golden():
    z = torch.from_numpy(Z).requires_grad_()
    nt_xent(z[:4], z[4:], 0.5).backward()
    assert z.grad.norm().item() == pytest.approx(0.25038412594509973, rel=1e-10)
    row = [0.008615887812719193, -0.005371216520477527, -0.01683215379652043]
    row += [-0.0203766661324017, -0.01433771399202322, -0.0015555109282352902]
    assert z.grad[0].tolist() == pytest.approx(row, rel=1e-9)


@pytest.mark.parametrize("m, n, d", [(2, 1, 3), (2, 7, 5), (3, 5, 4), (4, 3, 8)])
@pytest.mark.parametrize("form", ["out", "in"])
def test_equals_slow_reference(m, n, d, form):
    z = torch.randn(m, n, d, generator=torch.Generator().manual_seed(m * n))
    for temperature in (0.07, 0.5, 2.0):
        assert multi_positive(z, temperature, form).item() == pytest.approx(
            slow(z, temperature, form), rel=2e-5, abs=1e-6
        )


@pytest.mark.parametrize("similarities", [1, 100, 15 * 14])
@pytest.mark.parametrize("form", ["out", "in"])
def test_many_anchors_are_compared_in_parts(monkeypatch, form, similarities):
    z = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = [z.clone().requires_grad_(), z.clone().requires_grad_()]
    loss = multi_positive(expected[0], 0.2, form)
    loss.backward()
    sizes = []

    def counted(anchors, *rest):
        sizes.append(len(anchors))
        return losses_of(anchors, *rest)

    losses_of = Losses._losses_of
    monkeypatch.setattr(Losses, "_losses_of", counted)
    monkeypatch.setattr(Losses, "SIMILARITIES", similarities)
    in_parts = multi_positive(expected[1], 0.2, form)
    assert sum(sizes) == 15
    assert max(sizes) == max(1, similarities // 15)
    in_parts.backward()
    torch.testing.assert_close(in_parts, loss)
    torch.testing.assert_close(expected[1].grad, expected[0].grad)


def test_forms_agree_at_one_positive_and_views_are_symmetric():
    a, b = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(nt_xent(a, b, 0.2), multi_positive(torch.stack([a, b]), 0.2, "out"))
    torch.testing.assert_close(multi_positive(torch.stack([a, b]), 0.2, "in"), nt_xent(a, b, 0.2))
    torch.testing.assert_close(nt_xent(a, b, 0.2), nt_xent(b, a, 0.2))


@pytest.mark.parametrize("n", [2, 8, 16])
def test_collapse_gives_log_of_the_others(n):
    same = torch.ones(n, 4)
    assert nt_xent(same, same, 0.5).item() == pytest.approx(math.log(2 * n - 1), rel=1e-6)
    statistics = view_statistics(torch.stack([same, same]))
    assert statistics["embedding_std"].item() == pytest.approx(0, abs=1e-6)
    assert statistics["uniformity"].item() == pytest.approx(0, abs=1e-6)


def test_small_temperature_and_low_precision_stay_finite():
    z = torch.randn(2, 33, 16, generator=torch.Generator().manual_seed(2))
    exact = nt_xent(*z.double(), 0.01).item()
    assert nt_xent(*z, 0.01).item() == pytest.approx(exact, rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):  # the similarities must not be rounded
        assert nt_xent(*z, 0.01).item() == pytest.approx(exact, rel=1e-4)


def test_view_statistics_of_orthogonal_pairs():
    z = torch.eye(4).expand(2, 4, 4)
    statistics = {key: value.item() for key, value in view_statistics(z).items()}
    assert statistics["alignment"] == 0
    assert statistics["uniformity"] == pytest.approx(-4)  # all squared distances are 2
    assert statistics["embedding_std"] == pytest.approx(math.sqrt(0.25 * 0.75) * 2)


def test_view_statistics_equal_the_slow_ones():
    z = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0)) + 1
    a, b = (np.array([row / np.linalg.norm(row) for row in view]) for view in z[:2].double().numpy())
    near = [math.exp(-2 * ((p - q) ** 2).sum()) for i, p in enumerate(a) for j, q in enumerate(a) if i != j]
    wanted = {
        "embedding_std": a.std(axis=0).mean() * math.sqrt(5),
        "alignment": ((a - b) ** 2).sum(axis=1).mean(),
        "uniformity": math.log(np.mean(near)),
    }
    statistics = {name: value.item() for name, value in view_statistics(z).items()}
    assert statistics == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_with_two_views_every_form_is_nt_xent(form):
    z = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    for temperature in (0.1, 0.5):
        wanted = nt_xent(z[0], z[1], temperature).item()
        assert contrastive(z, temperature, form, weight=7.0).item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("form", ["out", "in"])
def test_lout_and_lin_compare_all_views(form):
    z = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0))
    assert contrastive(z, 0.2, f"l{form}").item() == pytest.approx(slow(z, 0.2, form), rel=1e-5)


@pytest.mark.parametrize("m", [3, 4])
@pytest.mark.parametrize("form", ["ntxent", "align"])
def test_ntxent_and_align_add_the_mean_of_the_first_view_with_the_further_ones(form, m):
    z = torch.randn(m, 8, 16, generator=torch.Generator().manual_seed(0))
    added = 0.0
    for further in z[2:]:
        distance = 2 - 2 * F.cosine_similarity(z[0], further)
        added += nt_xent(z[0], further, 0.5) if form == "ntxent" else distance.mean()
    wanted = nt_xent(z[0], z[1], 0.5) + 0.25 * added / (m - 2)
    assert contrastive(z, 0.5, form, weight=0.25).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_unknown_forms_and_single_views_are_refused():
    with pytest.raises(ValueError, match=r"'mean': choose lout, lin"):
        contrastive(torch.zeros(2, 3, 4), form="mean")
    with pytest.raises(ValueError, match="'mean'"):
        multi_positive(torch.zeros(2, 3, 4), 0.5, "mean")
    with pytest.raises(ValueError, match="M >= 2"):
        multi_positive(torch.zeros(1, 3, 4))
