"""The search against a plain one, memory that runs out, and the properties 4 to 8 and 11 to 14 of camnet.md 7.6.

test_generator.py has 1, 2, 3, 9 and 15; 10, of distances alone, is in test_distances.py.
"""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch

from CamNet.Codes import make_keys
from CamNet.Corruptions import pyramid
from CamNet.Distances import Pixels
from CamNet.Generator import Generator
from CamNet.IMLE import NONE, Search, loss
from Images import Shapes


def task(n=4, corrupt="gray+down2", size=16, seed=0, net="tiny", **changes):
    """A generator, n images to find codes for, and all that the search and the loss take beside them."""
    torch.manual_seed(seed)
    generator, distance, keys = Generator(net, size, corrupt, **changes), Pixels(), make_keys(seed, torch.arange(n))
    labels = torch.arange(n) % len(Shapes.CLASSES)
    images = Shapes.draw(labels, size, torch.Generator().manual_seed(seed)).float() / 255
    targets = pyramid(images, generator.sides)
    parts = {"condition": generator.corruption(images, keys), "targets": targets}
    parts["wanted"] = [distance.features(target) for target in targets]
    return SimpleNamespace(generator=generator, distance=distance, keys=keys, **parts)


def search(counts, at, keys=None, previous=None, rows=slice(None), **options):
    """`Search` on the images `rows` of a task."""
    keys = at.keys if keys is None else keys
    wanted = [[feature[rows] for feature in features] for features in at.wanted]
    previous = None if previous is None else previous[rows]
    run = options.pop("run", None) or Search(counts, **options)
    return run(at.generator, at.distance, at.condition[rows], wanted, keys[rows], previous)


def all_distances(at, image, chosen, candidates):
    """The distance of every candidate of the level after the chosen ones: each by a run of its own, from the start."""
    level, found = len(chosen), []
    for candidate in candidates:
        keys = torch.tensor([[*chosen, candidate]])
        x = at.generator(at.condition[image : image + 1], at.generator.codes(keys))[-1]
        found.append(at.distance(x, at.targets[level][image : image + 1]).item())
    return found


@torch.no_grad()
def slow_search(counts, at, previous=None, reject=0.0):
    """(keys, distances) as lists: one image, one level and one candidate after the other."""
    keys, distances = [], []
    for image, key in enumerate(at.keys):
        chosen, kept = [], []
        for level, count in zip(range(len(at.targets)), [*counts, *[counts[-1]] * 9]):
            candidates = [make_keys(key, level, number).item() for number in range(count)]
            found = all_distances(at, image, chosen, candidates)
            allowed = [d for d in found if d >= reject]
            best = min(allowed) if allowed else max(found)
            chosen.append(candidates[found.index(best)])
            kept.append(best)
        if previous is not None:
            codes = previous[image].tolist()
            old = [all_distances(at, image, codes[:level], [codes[level]])[0] for level in range(len(codes))]
            chosen, kept = (codes, old) if sum(old) <= sum(kept) else (chosen, kept)
        keys.append(chosen)
        distances.append(kept)
    return keys, distances


def check(found, slow):
    keys, distances = slow
    assert found.keys.tolist() == keys
    torch.testing.assert_close(found.distances, torch.tensor(distances), rtol=0, atol=1e-5)


def train(at, run, periods, steps, lr=2e-3, seed=0):
    """Train; return (mean found distance, first loss, last loss) of each period."""
    optimizer, log = torch.optim.Adam(at.generator.parameters(), lr, betas=(0.9, 0.99)), []
    for period in range(periods):
        found = search(None, at, make_keys(seed, period, at.keys), run=run)
        losses = []
        for _ in range(steps):
            value = loss(at.generator, at.distance, at.condition, at.wanted, found.keys)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
        log.append((found.distances.sum(1).mean().item(), losses[0], losses[-1]))
    return log


@pytest.fixture(scope="module")
def trained():
    """A task of 4 images after 8 periods of 8 steps, with its log."""
    at = task(corrupt="gray")
    at.before = copy.deepcopy(at.generator)
    at.log = train(at, Search((16, 8)), 8, 8)
    return at


# the properties of camnet.md 7.6


def test_property_4_more_candidates_are_never_worse():
    at = task(16)
    at.wanted = at.wanted[:1]  # later levels start from other images
    distances = torch.cat([search((count,), at).distances for count in (1, 2, 3, 4, 8, 16)], dim=1)
    assert (distances.diff(dim=1) <= 1e-6).all()
    one, four, sixteen = distances[:, [0, 3, 5]].mean(dim=0).tolist()
    assert sixteen < four < one


@pytest.mark.parametrize(
    "corrupt, changes, counts",
    [
        ("gray+down2", {}, (7, 4)),
        ("down4", {"mapping": "per_level", "level_input": "output", "project": False}, (5,)),
        ("gray+mask0.5", {}, (4, 6)),
        ("gray", {"size": 32, "levels": 3}, (6, 3)),
    ],
)
def test_property_5_search_equals_a_plain_one(corrupt, changes, counts):
    at = task(3, corrupt, **changes)
    check(search(counts, at), slow_search(counts, at))


def test_property_5_search_equals_a_plain_one_with_previous_codes():
    at = task(8)
    previous = search((4, 3), at, at.keys + 1).keys  # good ones, so that some are kept
    found = search((3, 2), at, previous=previous)
    check(found, slow_search((3, 2), at, previous))
    kept = (found.keys == previous).all(dim=1)
    assert kept.any() and not kept.all()
    assert ((found.keys == previous).any(dim=1) == kept).all()  # whole chains
    none = torch.full_like(previous, NONE)
    assert torch.equal(search((3, 2), at, previous=none).keys, search((3, 2), at).keys)


@pytest.mark.parametrize("corrupt", ["gray+down2", "gray+mask0.5"])
def test_property_6_chunk_and_other_images_play_no_part(corrupt):
    at = task(5, corrupt)
    previous = search((2,), at, at.keys + 1).keys
    whole = search((6, 4), at, previous=previous)
    for chunk in (1, 3, 7, 8, 15, 34):
        found = search((6, 4), at, previous=previous, chunk=chunk)
        assert torch.equal(found.keys, whole.keys)
        torch.testing.assert_close(found.distances, whole.distances, rtol=0, atol=1e-6)
    for rows in ([0], [4], [3, 1], [2, 2, 0]):
        found = search((6, 4), at, previous=previous, rows=rows)
        assert torch.equal(found.keys, whole.keys[rows])
        torch.testing.assert_close(found.distances, whole.distances[rows], rtol=0, atol=1e-6)


@pytest.mark.parametrize("corrupt", ["gray+down2", "down4", "gray+mask0.5"])
def test_property_7_training_sees_the_distances_that_the_search_found(corrupt):
    at = task(5, corrupt)
    found = search((6, 4), at)
    images = at.generator(at.condition, at.generator.codes(found.keys))
    distances = torch.stack([at.distance(x, y) for x, y in zip(images, at.targets, strict=True)], dim=1)
    torch.testing.assert_close(distances.detach(), found.distances, rtol=0, atol=1e-5)
    value = loss(at.generator, at.distance, at.condition, at.wanted, found.keys)
    assert value.requires_grad and value.shape == ()
    assert value.item() == pytest.approx(found.distances.sum().item() / 5, abs=1e-5)  # levels summed, images averaged


def test_property_8_gradient_reaches_the_chosen_code_alone():
    at, counts = task(2), (5, 4)
    found, draw, leaves = search(counts, at), at.generator.draw, {}

    def lookup(keys, level):
        """The codes as leaves, one for each key."""
        for key in keys.tolist():
            if (key, level) not in leaves:
                leaves[key, level] = [part.clone().requires_grad_() for part in draw(torch.tensor([key]), level)]
        return [torch.cat([leaves[key, level][part] for key in keys.tolist()]) for part in (0, 1)]

    at.generator.draw = lookup
    candidates = [make_keys(at.keys[:, None], level, torch.arange(count)) for level, count in enumerate(counts)]
    for level, keys in enumerate(candidates):
        lookup(keys.flatten(), level)
    for target in at.targets:
        target.requires_grad_()
    at.wanted = [[feature.detach() for feature in at.distance.features(target)] for target in at.targets]
    loss(at.generator, at.distance, at.condition, at.wanted, found.keys).backward()
    chosen = {(key, level) for keys in found.keys.tolist() for level, key in enumerate(keys)}
    assert len(leaves) == 2 * sum(counts) and len(chosen) == 4 and chosen < set(leaves)
    for place, parts in leaves.items():
        for part in parts:
            moved = part.grad is not None and part.grad.abs().max() > 0
            assert moved == (place in chosen)
    assert all(target.grad is None for target in at.targets)


def test_property_11_previous_codes_keep_the_distance_from_rising():
    at = task(32, "gray")
    found, kept_all = search((16, 8), at), 0
    for period in range(4):
        after = search((16, 8), at, make_keys(period, at.keys), previous=found.keys)
        kept = (after.keys == found.keys).all(dim=1)
        assert (after.distances.sum(1) <= found.distances.sum(1) + 1e-6).all() and not kept.all()
        found, kept_all = after, kept_all + kept.sum().item()
    assert kept_all > 32  # the rule was at work


def test_property_12_overfits_four_images(trained):
    first = trained.log[0][0]
    after = search((16, 8), trained, trained.keys + 99).distances.sum(1).mean().item()  # of new codes
    assert after < first / 2, (first, after)
    for found, start, end in trained.log:
        assert start == pytest.approx(found, abs=1e-5) and end < start


def test_property_12_a_trained_generator_needs_its_codes(trained):
    """The distance depends on the code far more than at the start: the 16 candidates are not all alike."""
    gains = []
    for generator in (trained.before, trained.generator):
        at = SimpleNamespace(**{**vars(trained), "generator": generator})
        one, best = (search((count,), at, at.keys + 7).distances.sum(1).mean().item() for count in (1, 16))
        gains.append(1 - best / one)
    assert gains[1] > 2 * gains[0] > 0, gains


@pytest.mark.parametrize("corrupt", ["gray+down2", "gray+down4"])
def test_property_13_the_found_codes_are_nearer_than_random_ones(corrupt):
    at = task(16, corrupt)
    found = search((16, 8), at)
    random = torch.stack([search((1,), at, make_keys(9, number, at.keys)).distances for number in range(15)])
    assert (found.distances[:, -1] <= random[:, :, -1].median(dim=0).values).float().mean() >= 0.8
    assert found.distances[:, -1].mean() < random[:, :, -1].median(dim=0).values.mean()
    assert (found.distances.sum(1) <= random.sum(2).median(dim=0).values).float().mean() >= 0.9


def three_steps(seed, stop=None):
    """The weights after three steps, or after being saved at `stop` of them and taken up by other objects."""
    at = task(seed=seed)
    found, optimizer = search((4, 2), at), torch.optim.Adam(at.generator.parameters(), 1e-3)
    for step in range(3):
        if step == stop:
            saved = copy.deepcopy((at.generator.state_dict(), optimizer.state_dict(), found.keys))
            at = task(seed=seed)
            at.generator = Generator(**at.generator.config)
            at.generator.load_state_dict(saved[0])
            optimizer = torch.optim.Adam(at.generator.parameters(), 1e-3)
            optimizer.load_state_dict(saved[1])
            found = found._replace(keys=saved[2])
        optimizer.zero_grad()
        loss(at.generator, at.distance, at.condition, at.wanted, found.keys).backward()
        optimizer.step()
    return torch.cat([value.flatten() for value in at.generator.state_dict().values()])


def test_property_14_same_seed_same_weights():
    weights = three_steps(0)
    assert torch.equal(three_steps(0), weights)
    assert not torch.equal(three_steps(1), weights)
    assert torch.equal(three_steps(0, stop=2), weights)


# what else the search promises


@pytest.mark.parametrize("counts, wanted", [((5, 3, 2), (5, 3, 2)), ((4, 1), (4, 1, 1)), ((2,), (2, 2, 2))])
def test_the_cost_is_the_sum_of_the_counts(counts, wanted):
    at = task(2, "gray", size=32, levels=3)
    step, rows = at.generator.step, [0] * 3

    def counted(level, condition, *args):
        rows[level] += len(condition)
        return step(level, condition, *args)

    at.generator.step = counted
    found = search(counts, at)
    assert rows == [2 * count for count in wanted]
    assert found.keys.shape == found.distances.shape == (2, 3)
    assert found.keys.dtype == torch.int64 and found.distances.dtype == torch.float32


def test_no_forward_exceeds_the_chunk():
    at = task(3)
    step, sizes = at.generator.step, []

    def counted(level, condition, *args):
        sizes.append(len(condition))
        return step(level, condition, *args)

    at.generator.step = counted
    for chunk in (1, 5, 7, 16, 100):
        sizes.clear()
        search((7, 3), at, chunk=chunk)
        assert max(sizes) <= chunk and sum(sizes) == 3 * 10
        assert chunk < 16 or max(sizes) == min(chunk // 7, 3) * 7  # and it is used


def test_the_search_leaves_no_trace():
    at = task(2)
    state, weights = torch.get_rng_state(), copy.deepcopy(at.generator.state_dict())
    first = search((4, 2), at)
    assert torch.equal(torch.get_rng_state(), state) and at.generator.training
    assert first.distances.is_inference()  # no graph: it would hold the memory of all candidates
    assert all(torch.equal(value, weights[name]) for name, value in at.generator.state_dict().items())
    assert all(parameter.grad is None for parameter in at.generator.parameters())
    again = search((4, 2), at)
    assert torch.equal(again.keys, first.keys) and torch.equal(again.distances, first.distances)
    assert (search((4, 2), at, at.keys + 1).keys != first.keys).all()


def test_a_single_candidate_is_taken_as_it_is():
    at = task(3)
    found = search((1,), at)
    assert torch.equal(found.keys, torch.stack([make_keys(at.keys, level, 0) for level in (0, 1)], dim=1))


@pytest.mark.parametrize("chunk", [1024, 3])
@pytest.mark.parametrize("refused", [2, 5, 8])
def test_rejection_passes_over_the_nearest(chunk, refused):
    """RS-IMLE; refused: how many of the 8 candidates of the first level of image 1 are too near."""
    at = task(3)
    with torch.no_grad():
        candidates = make_keys(at.keys[:, None], 0, torch.arange(8)).tolist()
        first = torch.tensor([all_distances(at, image, [], row) for image, row in enumerate(candidates)])
    ordered = torch.cat([first[1].sort().values, first.max()[None] + 0.1])
    reject = ordered[refused - 1 : refused + 1].mean().item()
    found = search((8, 5), at, reject=reject, chunk=chunk)
    check(found, slow_search((8, 5), at, reject=reject))
    wanted = ordered[refused] if refused < 8 else ordered[7]  # all are too near: the farthest of them
    assert found.distances[1, 0].item() == pytest.approx(wanted.item(), abs=1e-6)


class Given(Pixels):
    """Distances from a list, for every candidate of one image."""

    def __init__(self, values):
        super().__init__()
        self.values = torch.tensor(values)

    def between(self, features, target_features):
        done, self.values = self.values[: len(features[0])], self.values[len(features[0]) :]
        return done


@pytest.mark.parametrize(
    "values, reject, wanted",
    [
        ([0.3, 0.1, 0.2], 0.0, 1),
        ([0.3, 0.1, 0.2], 0.1, 1),  # as far as the bound is far enough
        ([0.3, 0.1, 0.2], 0.15, 2),
        ([0.3, 0.1, 0.2], 0.4, 0),
        ([0.0, 0.0, 0.0], 0.4, 0),
        ([0.0, 0.1, 0.05], 0.4, 1),
        ([0.399, 500.0, 0.3], 0.4, 1),  # any that is far enough before any that is not
        ([0.2, 0.1, 0.1], 0.0, 1),  # the first of equals
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_rejection_on_given_distances(values, reject, wanted, chunk):
    at = task(1)
    at.distance, at.wanted = Given(values), at.wanted[:1]
    found = search((3,), at, reject=reject, chunk=chunk)
    assert found.keys[0, 0].item() == make_keys(at.keys, 0, wanted).item()
    assert found.distances.item() == pytest.approx(values[wanted])


# memory that runs out


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def no_memory():
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes.")


def really_no_memory():
    torch.empty(1 << 60, dtype=torch.uint8)


FAILURES = [out_of_memory, no_memory, really_no_memory]


class Limited(Pixels):
    """Fails on more images than `limit`, or, if `pixels`, on more pixels of one channel."""

    def __init__(self, fail, limit, pixels=False):
        super().__init__()
        self.fail, self.limit, self.pixels = fail, limit, pixels

    def features(self, images):
        if len(images) * (images.shape[-1] ** 2 if self.pixels else 1) > self.limit:
            self.fail()
        return super().features(images)


def warned(function):
    """(result, the messages of its warnings)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    assert all(each.filename == __file__ for each in caught)  # they point at who called the search
    return result, [str(each.message) for each in caught]


@pytest.mark.parametrize("fail", FAILURES)
@pytest.mark.parametrize("part", ["distance", "generator"])
def test_out_of_memory_halves_the_chunk_once(fail, part):
    at = task(4)
    whole, step = search((8, 4), at), at.generator.step

    def limited(level, condition, *args):
        if len(condition) > 20:
            fail()
        return step(level, condition, *args)

    if part == "distance":
        at.distance = Limited(fail, 20)
    else:
        at.generator.step = limited
    run = Search((8, 4))
    found, messages = warned(lambda: search(None, at, run=run))
    assert messages == ["out of memory in the search: going on with --chunk 16"] and run.chunk == 16  # half of 4 * 8
    assert torch.equal(found.keys, whole.keys)
    torch.testing.assert_close(found.distances, whole.distances, rtol=0, atol=1e-6)
    again, messages = warned(lambda: search(None, at, run=run))
    assert not messages and torch.equal(again.keys, whole.keys)  # for good


def test_out_of_memory_down_to_parts_of_an_images_candidates():
    at = task(3)
    previous = search((2,), at, at.keys + 1).keys
    whole, run = search((8, 4), at, previous=previous), Search((8, 4), chunk=25)
    at.distance = Limited(no_memory, 2)
    found, messages = warned(lambda: search(None, at, previous=previous, run=run))
    assert [int(message.split()[-1]) for message in messages] == [12, 6, 3, 1] and run.chunk == 1
    assert torch.equal(found.keys, whole.keys)


@pytest.mark.parametrize("fail", FAILURES)
def test_out_of_memory_at_a_later_level_or_chunk(fail):
    at = task(5)
    whole, run = search((6,), at), Search((6,), chunk=12)
    at.distance = Limited(fail, 12 * 8**2, pixels=True)  # 12 at the first level, 3 at the second, of 16 px
    found, messages = warned(lambda: search(None, at, run=run))
    assert len(messages) == 2 and run.chunk == 3
    assert torch.equal(found.keys, whole.keys)
    at.distance, calls = Pixels(), []

    def once(images):
        calls.append(len(images))
        if len(calls) == 2:
            fail()
        return Pixels.features(at.distance, images)

    at.distance.features, run = once, Search((6,), chunk=12)
    found, messages = warned(lambda: search(None, at, run=run))  # the first 2 images are done: not again
    assert calls[:3] == [12, 12, 6] and len(messages) == 1 and torch.equal(found.keys, whole.keys)


def test_out_of_memory_with_a_single_candidate_is_an_error():
    at = task(2)
    at.distance, run = Limited(out_of_memory, 0), Search((4,), chunk=4)
    with pytest.raises(torch.OutOfMemoryError), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        search(None, at, run=run)
    assert run.chunk == 1 and [str(each.message)[-9:] for each in caught] == ["--chunk 2", "--chunk 1"]


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("memory")])
def test_other_errors_pass_through(error):
    def fail():
        raise error

    at = task(2)
    at.distance, run = Limited(fail, 0), Search((4,), chunk=4)
    with warnings.catch_warnings(), pytest.raises(type(error)) as caught:
        warnings.simplefilter("error")
        search(None, at, run=run)
    assert caught.value is error and run.chunk == 4


# bfloat16


@pytest.mark.parametrize("state", ["new", "trained"])
@pytest.mark.parametrize("seed", [0, 1])
def test_bfloat16_finds_mostly_the_same_codes(state, seed, trained):
    at = task(24, "gray", seed=seed)
    if state == "trained":
        at.generator = trained.generator
    exact = search((16, 8), at)
    with torch.autocast("cpu", torch.bfloat16):
        low = search((16, 8), at)
    share = (low.keys == exact.keys).float().mean().item()
    assert share >= 0.8, f"the same codes in {share:.0%}"
    assert low.distances.dtype == torch.float32 and not torch.equal(low.distances, exact.distances)
    torch.testing.assert_close(low.distances, exact.distances, rtol=0.03, atol=0)
