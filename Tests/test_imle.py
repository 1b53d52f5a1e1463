"""The search against a slow one, the loss, training with both, and memory that runs out."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch

from CamNet.Codes import make_keys
from CamNet.Corruptions import pyramid
from CamNet.Distances import Pixels
from CamNet.Generator import Generator
from CamNet.IMLE import NONE, OutOfMemoryWarning, Search, loss
from Images import Shapes


def task(n=4, corrupt="gray+down2", size=16, seed=0, net="tiny", **changes):
    """A generator, n images to find codes for, and the other arguments of the search and the loss."""
    torch.manual_seed(seed)
    generator = Generator(net, size, corrupt, **changes)
    distance = Pixels()
    keys = make_keys(seed, torch.arange(n))
    labels = torch.arange(n) % len(Shapes.CLASSES)
    images = Shapes.draw(labels, size, torch.Generator().manual_seed(seed)).float() / 255
    targets = pyramid(images, generator.sides)
    return SimpleNamespace(
        generator=generator,
        distance=distance,
        keys=keys,
        condition=generator.corruption(images, keys),
        targets=targets,
        wanted=[distance.features(target) for target in targets],
    )


def search(counts, at, keys=None, previous=None, rows=slice(None), **options):
    """`Search` on the images `rows` of a task."""
    keys = at.keys if keys is None else keys
    wanted = [[feature[rows] for feature in features] for features in at.wanted]
    previous = None if previous is None else previous[rows]
    run = options.pop("run", None) or Search(counts, **options)
    return run(at.generator, at.distance, at.condition[rows], wanted, keys[rows], previous)


def all_distances(at, image, chosen, candidates):
    """The distance of every candidate for the level after the chosen ones, each by a separate run of all levels."""
    level = len(chosen)
    found = []
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
            if sum(old) <= sum(kept):
                chosen = codes
                kept = old
        keys.append(chosen)
        distances.append(kept)
    return keys, distances


def check(found, slow):
    keys, distances = slow
    assert found.keys.tolist() == keys
    torch.testing.assert_close(found.distances, torch.tensor(distances), rtol=0, atol=1e-5)


def train(at, run, periods, steps, lr=2e-3, seed=0):
    """Train; return (mean found distance, first loss, last loss) of each period."""
    optimizer = torch.optim.Adam(at.generator.parameters(), lr, betas=(0.9, 0.99))
    log = []
    for period in range(periods):
        found = search(None, at, make_keys(seed, period, at.keys), run=run)
        losses = []
        for _ in range(steps):
            value = loss(at.generator, at.distance, at.condition, at.wanted, at.generator.codes(found.keys))
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


# what the search finds


def test_more_candidates_are_never_worse():
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
def test_search_equals_a_slow_one(corrupt, changes, counts):
    at = task(3, corrupt, **changes)
    check(search(counts, at), slow_search(counts, at))


def test_search_with_previous_codes_equals_a_slow_one():
    at = task(8)
    previous = search((4, 3), at, at.keys + 1).keys  # good ones, so that some are kept
    found = search((3, 2), at, previous=previous)
    check(found, slow_search((3, 2), at, previous))
    kept = (found.keys == previous).all(dim=1)
    assert kept.any()
    assert not kept.all()
    assert ((found.keys == previous).any(dim=1) == kept).all()  # whole chains
    none = torch.full_like(previous, NONE)
    assert torch.equal(search((3, 2), at, previous=none).keys, search((3, 2), at).keys)


@pytest.mark.parametrize("corrupt", ["gray+down2", "gray+mask0.5"])
def test_chunk_and_other_images_have_no_effect(corrupt):
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
def test_training_sees_the_distances_that_the_search_found(corrupt):
    at = task(5, corrupt)
    found = search((6, 4), at)
    images = at.generator(at.condition, at.generator.codes(found.keys))
    distances = torch.stack([at.distance(x, y) for x, y in zip(images, at.targets, strict=True)], dim=1)
    torch.testing.assert_close(distances.detach(), found.distances, rtol=0, atol=1e-5)
    value = loss(at.generator, at.distance, at.condition, at.wanted, at.generator.codes(found.keys))
    assert value.requires_grad
    assert value.shape == ()
    assert value.item() == pytest.approx(found.distances.sum().item() / 5, abs=1e-5)  # levels summed, images averaged


def test_compiled_gradients_are_those_of_eager_mode():
    """torch._weight_norm, compiled, gave wrong gradients in channels_last: see `Generator.WeightNorm`."""
    at = task(size=8)
    at.generator.to(memory_format=torch.channels_last)
    other = copy.deepcopy(at.generator)
    keys = make_keys(at.keys[:, None], torch.arange(1))
    value = loss(at.generator, at.distance, at.condition, at.wanted, at.generator.codes(keys))
    value.backward()
    torch._dynamo.reset()
    compiled = torch.compile(loss, dynamic=False, backend="aot_eager")
    its_value = compiled(other, at.distance, at.condition, at.wanted, other.codes(keys))
    its_value.backward()
    torch.testing.assert_close(its_value, value)
    for (name, mine), theirs in zip(at.generator.named_parameters(), other.parameters(), strict=True):
        error = (mine.grad - theirs.grad).norm()
        assert error <= 1e-4 * mine.grad.norm() + 1e-9, name


def test_the_gradient_reaches_the_chosen_codes_only():
    at = task(2)
    counts = (5, 4)
    found = search(counts, at)
    draw = at.generator.draw
    leaves = {}

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
    loss(at.generator, at.distance, at.condition, at.wanted, at.generator.codes(found.keys)).backward()
    chosen = {(key, level) for keys in found.keys.tolist() for level, key in enumerate(keys)}
    assert len(leaves) == 2 * sum(counts)
    assert len(chosen) == 4
    assert chosen < set(leaves)
    for place, parts in leaves.items():
        for part in parts:
            moved = part.grad is not None and part.grad.abs().max() > 0
            assert moved == (place in chosen)
    assert all(target.grad is None for target in at.targets)


# training


def test_with_previous_codes_the_distance_never_rises():
    at = task(32, "gray")
    found = search((16, 8), at)
    kept_all = 0
    for period in range(4):
        after = search((16, 8), at, make_keys(period, at.keys), previous=found.keys)
        kept = (after.keys == found.keys).all(dim=1)
        assert (after.distances.sum(1) <= found.distances.sum(1) + 1e-6).all()
        assert not kept.all()
        found = after
        kept_all += kept.sum().item()
    assert kept_all > 32  # previous codes were kept often


def test_training_overfits_four_images(trained):
    first = trained.log[0][0]
    after = search((16, 8), trained, trained.keys + 99).distances.sum(1).mean().item()  # of new codes
    assert after < first / 2, (first, after)
    for found, start, end in trained.log:
        assert start == pytest.approx(found, abs=1e-5)
        assert end < start


def test_a_trained_generator_needs_its_codes(trained):
    """The best of 16 candidates is better than the first by a larger factor than before the training."""
    gains = []
    for generator in (trained.before, trained.generator):
        at = copy.copy(trained)
        at.generator = generator
        first = search((1,), at, at.keys + 7).distances.sum(1).mean().item()
        best = search((16,), at, at.keys + 7).distances.sum(1).mean().item()
        gains.append(1 - best / first)
    before, after = gains
    assert before > 0
    assert after > 2 * before


@pytest.mark.parametrize("corrupt", ["gray+down2", "gray+down4"])
def test_the_found_codes_are_nearer_than_random_ones(corrupt):
    at = task(16, corrupt)
    found = search((16, 8), at)
    random = torch.stack([search((1,), at, make_keys(9, number, at.keys)).distances for number in range(15)])
    assert (found.distances[:, -1] <= random[:, :, -1].median(dim=0).values).float().mean() >= 0.8
    assert found.distances[:, -1].mean() < random[:, :, -1].median(dim=0).values.mean()
    assert (found.distances.sum(1) <= random.sum(2).median(dim=0).values).float().mean() >= 0.9


def three_steps(seed, stop=None):
    """The weights after three steps; with `stop`, all state is saved before that step and loaded into new objects."""
    at = task(seed=seed)
    found = search((4, 2), at)
    optimizer = torch.optim.Adam(at.generator.parameters(), 1e-3)
    for step in range(3):
        if step == stop:
            weights = copy.deepcopy(at.generator.state_dict())
            state = copy.deepcopy(optimizer.state_dict())
            at = task(seed=seed)
            at.generator = Generator(**at.generator.config)
            at.generator.load_state_dict(weights)
            optimizer = torch.optim.Adam(at.generator.parameters(), 1e-3)
            optimizer.load_state_dict(state)
            found = found._replace(keys=found.keys.clone())
        optimizer.zero_grad()
        loss(at.generator, at.distance, at.condition, at.wanted, at.generator.codes(found.keys)).backward()
        optimizer.step()
    return torch.cat([value.flatten() for value in at.generator.state_dict().values()])


def test_the_same_seed_gives_the_same_weights_resumed_or_not():
    weights = three_steps(0)
    assert torch.equal(three_steps(0), weights)
    assert not torch.equal(three_steps(1), weights)
    assert torch.equal(three_steps(0, stop=2), weights)


# cost, memory and side effects of the search


@pytest.mark.parametrize("counts, wanted", [((5, 3, 2), (5, 3, 2)), ((4, 1), (4, 1, 1)), ((2,), (2, 2, 2))])
def test_the_cost_is_the_sum_of_the_counts(counts, wanted):
    at = task(2, "gray", size=32, levels=3)
    step = at.generator.step
    rows = [0] * 3

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
    step = at.generator.step
    sizes = []

    def counted(level, condition, *args):
        sizes.append(len(condition))
        return step(level, condition, *args)

    at.generator.step = counted
    for chunk in (1, 5, 7, 16, 100):
        sizes.clear()
        search((7, 3), at, chunk=chunk)
        assert max(sizes) <= chunk
        assert sum(sizes) == 3 * 10
        if chunk >= 16:  # as many whole images as fit
            assert max(sizes) == min(chunk // 7, 3) * 7


def test_the_search_changes_nothing_and_repeats_itself():
    at = task(2)
    state = torch.get_rng_state()
    weights = copy.deepcopy(at.generator.state_dict())
    first = search((4, 2), at)
    assert torch.equal(torch.get_rng_state(), state)
    assert at.generator.training
    assert first.distances.is_inference()  # a graph would hold the memory of all candidates
    assert all(torch.equal(value, weights[name]) for name, value in at.generator.state_dict().items())
    assert all(parameter.grad is None for parameter in at.generator.parameters())
    again = search((4, 2), at)
    assert torch.equal(again.keys, first.keys)
    assert torch.equal(again.distances, first.distances)
    assert (search((4, 2), at, at.keys + 1).keys != first.keys).all()


def test_a_single_candidate_is_taken_as_it_is():
    at = task(3)
    found = search((1,), at)
    assert torch.equal(found.keys, torch.stack([make_keys(at.keys, level, 0) for level in (0, 1)], dim=1))


@pytest.mark.parametrize("chunk", [1024, 3])
@pytest.mark.parametrize("refused", [2, 5, 8])
def test_rejection_passes_over_the_nearest(chunk, refused):
    """refused: how many of the 8 candidates on the first level of image 1 are too near."""
    at = task(3)
    with torch.no_grad():
        candidates = make_keys(at.keys[:, None], 0, torch.arange(8)).tolist()
        first = torch.tensor([all_distances(at, image, [], row) for image, row in enumerate(candidates)])
    ordered = torch.cat([first[1].sort().values, first.max()[None] + 0.1])
    reject = ordered[refused - 1 : refused + 1].mean().item()
    found = search((8, 5), at, reject=reject, chunk=chunk)
    check(found, slow_search((8, 5), at, reject=reject))
    wanted = ordered[min(refused, 7)]  # the nearest that is far enough; the farthest of all where all are too near
    assert found.distances[1, 0].item() == pytest.approx(wanted.item(), abs=1e-6)


class Given(Pixels):
    """Distances from a list, for every candidate of one image."""

    def __init__(self, values):
        super().__init__()
        self.values = torch.tensor(values)

    def between(self, features, target_features):
        n = len(features[0])
        values = self.values[:n]
        self.values = self.values[n:]
        return values


@pytest.mark.parametrize(
    "values, reject, wanted",
    [
        ([0.3, 0.1, 0.2], 0.0, 1),
        ([0.3, 0.1, 0.2], 0.1, 1),  # a distance equal to `reject` is far enough
        ([0.3, 0.1, 0.2], 0.15, 2),
        ([0.3, 0.1, 0.2], 0.4, 0),
        ([0.0, 0.0, 0.0], 0.4, 0),
        ([0.0, 0.1, 0.05], 0.4, 1),
        ([0.399, 500.0, 0.3], 0.4, 1),  # far enough, however far, is better than too near
        ([0.2, 0.1, 0.1], 0.0, 1),  # the first of equal ones
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_rejection_on_given_distances(values, reject, wanted, chunk):
    at = task(1)
    at.distance = Given(values)
    at.wanted = at.wanted[:1]
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
    assert all(each.category is OutOfMemoryWarning for each in caught)
    return result, [str(each.message) for each in caught]


@pytest.mark.parametrize("fail", FAILURES)
@pytest.mark.parametrize("part", ["distance", "generator"])
def test_out_of_memory_halves_the_chunk_once(fail, part):
    at = task(4)
    whole = search((8, 4), at)
    step = at.generator.step

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
    assert messages == ["out of memory in the search: continuing with --chunk 16"]  # half of 4 * 8
    assert run.chunk == 16
    assert torch.equal(found.keys, whole.keys)
    torch.testing.assert_close(found.distances, whole.distances, rtol=0, atol=1e-6)
    again, messages = warned(lambda: search(None, at, run=run))
    assert not messages  # the chunk stays halved
    assert torch.equal(again.keys, whole.keys)


def test_out_of_memory_down_to_parts_of_an_images_candidates():
    at = task(3)
    previous = search((2,), at, at.keys + 1).keys
    whole = search((8, 4), at, previous=previous)
    run = Search((8, 4), chunk=25)
    at.distance = Limited(no_memory, 2)
    found, messages = warned(lambda: search(None, at, previous=previous, run=run))
    assert [int(message.split()[-1]) for message in messages] == [12, 6, 3, 1]
    assert run.chunk == 1
    assert torch.equal(found.keys, whole.keys)


@pytest.mark.parametrize("fail", FAILURES)
def test_out_of_memory_at_a_later_level_or_chunk(fail):
    at = task(5)
    whole = search((6,), at)
    run = Search((6,), chunk=12)
    at.distance = Limited(fail, 12 * 8**2, pixels=True)  # 12 at the first level, 3 at the second, of 16 px
    found, messages = warned(lambda: search(None, at, run=run))
    assert len(messages) == 2
    assert run.chunk == 3
    assert torch.equal(found.keys, whole.keys)
    at.distance = Pixels()
    calls = []

    def once(images):
        calls.append(len(images))
        if len(calls) == 2:
            fail()
        return Pixels.features(at.distance, images)

    at.distance.features = once
    run = Search((6,), chunk=12)
    found, messages = warned(lambda: search(None, at, run=run))
    assert calls[:3] == [12, 12, 6]  # the first 2 images are not repeated
    assert len(messages) == 1
    assert torch.equal(found.keys, whole.keys)


def test_out_of_memory_with_a_single_candidate_is_an_error():
    at = task(2)
    at.distance = Limited(out_of_memory, 0)
    run = Search((4,), chunk=4)
    with pytest.raises(torch.OutOfMemoryError), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        search(None, at, run=run)
    assert run.chunk == 1
    assert [str(each.message)[-9:] for each in caught] == ["--chunk 2", "--chunk 1"]


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("memory")])
def test_other_errors_pass_through(error):
    def fail():
        raise error

    at = task(2)
    at.distance = Limited(fail, 0)
    run = Search((4,), chunk=4)
    with warnings.catch_warnings(), pytest.raises(type(error)) as caught:
        warnings.simplefilter("error")
        search(None, at, run=run)
    assert caught.value is error
    assert run.chunk == 4


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
    same = (low.keys == exact.keys).float().mean().item()
    assert same >= 0.8, f"only {same:.0%} of the codes are the same"
    assert low.distances.dtype == torch.float32
    assert not torch.equal(low.distances, exact.distances)
    torch.testing.assert_close(low.distances, exact.distances, rtol=0.03, atol=0)
