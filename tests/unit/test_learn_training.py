"""Augmentation against slow loops, the loop against torch's own optimizer, distillation against its definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import cos, exp, log, nan, pi

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lemonade_hpc import config, data
from lemonade_hpc.learn import training, transfer
from lemonade_hpc.learn.network import Network, build
from lemonade_hpc.learn.training import Batch, Diverged, Images, Moment
from lemonade_hpc.search.graph import Graph, chain
from lemonade_hpc.search.ops import Add, BatchNorm, Conv, GlobalPool, Input, Linear, ReLU, Signature

CPU = torch.device("cpu")
SIGNATURE = Signature((3, 6, 5), 4)
GRAPH = chain([Input(), Conv(6, 3), BatchNorm(), ReLU(), Conv(5, 3), BatchNorm(), ReLU(), GlobalPool(), Linear()])

torch.set_num_threads(1)


def settings(**changed: object) -> config.Training:
    """No augmentation, no decay, batches of 8 unless changed."""
    plain = {"pad": 0, "flip": False, "cutout": 0, "mixup": 0.0, "weight_decay": 0.0, "batch_size": 8}
    return config.Training.model_validate(plain | changed)


def some_images(count: int = 20, image: tuple[int, ...] = SIGNATURE.image, seed: int = 0) -> Images:
    """Images whose class can be learned: brighter means a higher label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, size=count)
    pixels = np.clip(rng.normal(40 + 50 * labels[:, None, None, None], 20, size=(count, *image)), 0, 255)
    part = data.Part(pixels.astype(np.uint8), labels)
    return training.place(data.DataSet("some", part, part, part, 4, ""), part, CPU)


def network(seed: int = 0, graph: Graph = GRAPH) -> Network:
    return build(graph, SIGNATURE, transfer.initial_weights(graph, SIGNATURE, torch.Generator().manual_seed(seed)))


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng([7, seed])


# ---------------------------------------------------------------- data on the device


def test_images_stay_bytes_and_are_normalised_by_the_training_part() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size=(50, 3, 4, 4)).astype(np.uint8)
    pixels[:, 2] = 9  # a constant channel divides by 1, not by 0
    train = data.Part(pixels, np.arange(50) % 4)
    other = data.Part(pixels[:7] // 2, np.arange(7) % 4)
    whole = data.DataSet("some", train, other, other, 4, "")
    placed = training.place(whole, train, CPU)
    assert placed.images.dtype == torch.uint8
    x = placed.normalise(placed.images)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(dim=(0, 2, 3), correction=0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-5, rtol=0)
    mean, std = pixels.mean(axis=(0, 2, 3)), np.maximum(pixels.std(axis=(0, 2, 3)), 1)
    expected = (other.images - mean[:, None, None]) / std[:, None, None]
    validation = training.place(whole, other, CPU)
    assert np.allclose(validation.first(3, skip=2).numpy(), expected[2:5], atol=1e-5)
    assert len(validation.first(100)) == 7


# ---------------------------------------------------------------- augmentation


@pytest.mark.parametrize("pad", [1, 4])
def test_crop_against_a_slow_loop(pad: int) -> None:
    images = some_images().images
    at = torch.tensor([3, 3, 0, 19, 7, 11, 2, 5])
    cropped = training.crop(images, at, pad, rng_of(0))
    assert cropped.dtype == torch.uint8
    offsets = rng_of(0).integers(0, 2 * pad + 1, size=(2, len(at)))
    _, channels, height, width = images.shape
    for b, source in enumerate(at.tolist()):
        for c in range(channels):
            for y in range(height):
                for x in range(width):
                    row, column = y + int(offsets[0][b]) - pad, x + int(offsets[1][b]) - pad
                    inside = 0 <= row < height and 0 <= column < width
                    assert cropped[b, c, y, x] == (images[source, c, row, column] if inside else 0)


def test_crops_reach_every_place() -> None:
    images = torch.arange(1, 10, dtype=torch.uint8).reshape(1, 1, 3, 3)
    cropped = training.crop(images, torch.zeros(400, dtype=torch.long), 1, rng_of(0))
    assert len(torch.unique(cropped.flatten(1), dim=0)) == 9


def augmented(index: np.ndarray[tuple[int], np.dtype[np.int64]], seed: int = 0, **changed: object) -> Batch:
    return training.augment(some_images(), index, settings(**changed), rng_of(seed))


ALL = np.arange(20)


def test_without_augmentation_a_batch_is_the_images() -> None:
    source = some_images()
    batch = augmented(ALL[::-1].copy())
    assert torch.equal(batch.x_BCHW, source.normalise(source.images.flip(0)))
    assert torch.equal(batch.labels_B, source.labels.flip(0))
    assert batch.share == 1.0


def test_flip_mirrors_about_half_of_the_images_left_to_right() -> None:
    source = some_images()
    plain = source.normalise(source.images)
    x = augmented(ALL, flip=True).x_BCHW
    chosen = rng_of(0).random(20) < 0.5
    assert 4 < chosen.sum() < 16
    for k in range(20):
        assert torch.equal(x[k], plain[k].flip(2) if chosen[k] else plain[k])


@pytest.mark.parametrize("side", [1, 2, 3, 16])
def test_cutout_against_a_slow_loop(side: int) -> None:
    source = some_images()
    plain = source.normalise(source.images)
    x = augmented(ALL, cutout=side).x_BCHW
    _, _, height, width = plain.shape
    rng = rng_of(0)
    centre_y, centre_x = rng.integers(0, height, size=20), rng.integers(0, width, size=20)
    for k in range(20):
        for row in range(height):
            for column in range(width):
                top, left = centre_y[k] - side // 2, centre_x[k] - side // 2
                erased = top <= row < top + side and left <= column < left + side
                expected = torch.zeros(3) if erased else plain[k, :, row, column]
                assert torch.equal(x[k, :, row, column], expected)


def test_mixup_mixes_images_and_labels_by_one_share() -> None:
    source = some_images()
    plain = source.normalise(source.images)
    shares = []
    for seed in range(200):
        batch = augmented(ALL, seed=seed, mixup=0.5)
        shares.append(batch.share)
        rng = rng_of(seed)
        share, partner = rng.beta(0.5, 0.5), torch.from_numpy(rng.permutation(20))
        assert batch.share == share
        torch.testing.assert_close(batch.x_BCHW, share * plain + (1 - share) * plain[partner], rtol=1e-4, atol=1e-5)
        assert torch.equal(batch.labels_B, source.labels)
        assert torch.equal(batch.partners_B, source.labels[partner])
    assert np.mean(shares) == pytest.approx(0.5, abs=0.1) and np.var(shares) == pytest.approx(1 / 8, abs=0.03)


def test_cross_entropy_of_mixed_labels_against_the_definition() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    labels, partners = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([1, 1, 3, 0, 2, 2])
    expected = 0.0
    for k in range(6):
        total = log(sum(exp(float(value)) for value in logits[k]))
        for share, label in ((0.3, labels[k]), (0.7, partners[k])):
            expected += share * (total - float(logits[k, label])) / 6
    loss = training.cross_entropy(logits, Batch(torch.empty(0), labels, partners, 0.3))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    plain = training.cross_entropy(logits, Batch(torch.empty(0), labels, labels, 1.0))
    assert float(plain) == pytest.approx(float(F.cross_entropy(logits, labels)))


def test_one_stream_gives_the_same_batches_and_another_other_ones() -> None:
    everything = {"pad": 2, "flip": True, "cutout": 3, "mixup": 1.0}
    a, b, c = (augmented(ALL, seed=seed, **everything) for seed in (0, 0, 1))
    assert torch.equal(a.x_BCHW, b.x_BCHW) and a.share == b.share
    assert not torch.equal(a.x_BCHW, c.x_BCHW)


# ---------------------------------------------------------------- the loop


def batches_seen(stream: tuple[int, ...], epochs: int, **changed: object) -> list[Batch]:
    seen: list[Batch] = []

    def loss(logits_BK: Tensor, batch: Batch) -> Tensor:
        seen.append(batch)
        return logits_BK.sum()

    given = settings(**changed)
    training.fit(network(), some_images(), given, epochs=epochs, lr=1e-6, stream=stream, loss_of=loss)
    return seen


def test_an_epoch_shows_every_image_once_in_batches_of_nearly_one_size() -> None:
    seen = batches_seen((0, 1), epochs=2)
    assert [len(batch.labels_B) for batch in seen] == [7, 7, 6, 7, 7, 6]
    source = some_images()
    everything = sorted(map(tuple, source.normalise(source.images).flatten(1).tolist()))
    for epoch in (seen[:3], seen[3:]):
        assert sorted(tuple(row) for batch in epoch for row in batch.x_BCHW.flatten(1).tolist()) == everything
    assert not torch.equal(seen[0].x_BCHW, seen[3].x_BCHW)


def test_an_epochs_draws_depend_on_stream_and_epoch_alone() -> None:
    everything = {"pad": 2, "mixup": 1.0}
    long, again, short = (batches_seen((5, 6), n, **everything) for n in (3, 3, 1))
    other = batches_seen((5, 7), 1, **everything)
    assert all(torch.equal(a.x_BCHW, b.x_BCHW) for a, b in zip(long, again, strict=True))
    assert all(torch.equal(a.x_BCHW, b.x_BCHW) for a, b in zip(long, short, strict=False))
    assert not torch.equal(long[0].x_BCHW, other[0].x_BCHW)


def test_a_step_equals_torchs_sgd_and_the_rate_falls_as_a_cosine() -> None:
    given = settings(pad=1, weight_decay=0.01, momentum=0.8)
    source, lr, epochs = some_images(), 0.1, 2
    ours, theirs = network().double(), network().double()
    rates: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Images, "normalise", lambda self, x: ((x - self.mean_1C11) / self.std_1C11).double())
        step = training._step

        def noting(*args: object) -> None:
            rates.append(args[-1])  # type: ignore[arg-type]
            step(*args)  # type: ignore[arg-type]

        patch.setattr(training, "_step", noting)
        training.fit(ours, source, given, epochs=epochs, lr=lr, stream=(1, 2))

        optimizer = torch.optim.SGD(theirs.parameters(), lr=lr, momentum=0.8, weight_decay=0.01)
        theirs.train()
        k, steps = 0, 6
        for epoch in range(epochs):
            rng = np.random.default_rng([1, 2, epoch])
            for index in np.array_split(rng.permutation(20), 3):
                batch = training.augment(source, index, given, rng)
                optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + cos(pi * k / steps))
                optimizer.zero_grad()
                F.cross_entropy(theirs(batch.x_BCHW), batch.labels_B).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                k += 1
    assert rates == pytest.approx([lr * 0.5 * (1 + cos(pi * k / 6)) for k in range(6)])
    assert rates[0] == lr and rates[-1] < 0.1 * lr
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=1e-14)


def test_training_learns_and_ends_in_evaluation_mode() -> None:
    source, net = some_images(200), network()
    before = training.error(net, source)
    reported: list[int] = []
    training.fit(net, source, settings(), epochs=6, lr=0.1, stream=(0,), progress=reported.append)
    assert training.error(net, source) < 0.1 < before
    assert reported == [1, 2, 3, 4, 5, 6]
    assert not any(module.training for module in net.modules())


@pytest.mark.parametrize("only", [{1}, {4, 5}, {8}])
def test_what_is_not_trained_is_frozen_bit_for_bit(only: set[int]) -> None:
    net = network()
    before = net.weights()
    training.fit(net, some_images(), settings(weight_decay=0.1), epochs=2, lr=0.1, stream=(0,), only=only)
    changed = {name for name, value in net.weights().items() if not torch.equal(value, before[name])}
    trained = {name for name, _ in net.named_parameters() if int(name.split(".")[0]) in only}
    statistics = {name for name in before if "running" in name}  # of the data, not trained
    assert changed == trained | statistics


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    net = network()
    with pytest.raises(Diverged, match=r"the loss is nan in epoch 1 of 3"):
        training.fit(net, some_images(), settings(), epochs=3, lr=1e30, stream=(0,))
    late = iter([0.0] * 7 + [nan] + [0.0] * 10)
    with pytest.raises(Diverged, match="in epoch 3 of 3"):
        training.fit(
            network(), some_images(), settings(), epochs=3, lr=0.1, stream=(0,),
            loss_of=lambda logits, batch: logits.sum() + next(late),
        )  # fmt: skip


def test_a_loss_that_was_not_finite_before_an_interruption_still_ends_the_training() -> None:
    moments: list[Moment] = []
    given = {"epochs": 2, "lr": 0.1, "stream": (0,)}
    losses = iter([nan, 0.0, 0.0])
    with pytest.raises(Diverged):
        training.fit(
            network(), some_images(), settings(), **given, watch=moments.append,
            loss_of=lambda logits, batch: logits.sum() + next(losses),
        )  # fmt: skip
    assert [(moment.epoch, moment.batch) for moment in moments] == [(0, 1), (0, 2)]
    with pytest.raises(Diverged, match="in epoch 1 of 2"):
        training.fit(
            network(), some_images(), settings(), **given, begin=moments[0],
            loss_of=lambda logits, batch: logits.sum(),
        )  # fmt: skip


def test_a_watch_sees_every_moment_between_two_batches_and_the_end_of_an_epoch_as_the_next_ones_beginning() -> None:
    moments: list[Moment] = []
    training.fit(network(), some_images(), settings(), epochs=2, lr=0.1, stream=(0,), watch=moments.append)
    assert [(moment.epoch, moment.batch) for moment in moments] == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
    assert [moment.rng is None for moment in moments] == [moment.total is None for moment in moments]
    assert [moment.rng is None for moment in moments] == [False, False, True, False, False, True]


def test_answers_that_are_not_finite_have_no_error() -> None:
    net = network()
    net.load_weights(net.weights() | {"8.bias": torch.tensor([0.0, nan, 0.0, 0.0])})
    with pytest.raises(Diverged, match="not finite"):
        training.error(net, some_images())


def test_error_counts_every_image_in_evaluation_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    source, net = some_images(23), network().train()
    net.load_weights(net.weights() | {"2.running_mean": torch.full((6,), 0.3)})
    measured = training.error(net, source)
    with torch.no_grad():
        wrong = [int(net(source.first(1, skip=k)).argmax()) != int(source.labels[k]) for k in range(23)]
    assert 0 < measured < 1 and measured == sum(wrong) / 23
    monkeypatch.setattr(training, "EVAL_BATCH", 5)
    assert training.error(net, source) == measured


def test_distillation_against_a_slow_definition() -> None:
    """T^2 times the mean over images of sum_k p_k (log p_k - log q_k), both softened by T."""
    temperature = 3.0
    teacher, batch = network(1), Batch(some_images().first(5), torch.zeros(5), torch.zeros(5), 1.0)
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with torch.no_grad():
        answers = teacher(batch.x_BCHW)

    def soft(row: Tensor) -> list[float]:
        powers = [exp(float(value) / temperature) for value in row]
        return [power / sum(powers) for power in powers]

    expected = 0.0
    for target, answer in zip(answers, logits, strict=True):
        expected += sum(p * (log(p) - log(q)) for p, q in zip(soft(target), soft(answer.detach()), strict=True)) / 5
    loss = training.distillation(teacher, temperature)(logits, batch)
    assert float(loss.detach()) == pytest.approx(expected * temperature**2, rel=1e-4)
    assert float(training.distillation(teacher, temperature)(answers, batch)) == pytest.approx(0.0, abs=1e-6)
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None and all(p.grad is None for p in teacher.parameters())


def test_distillation_brings_a_disturbed_layer_back_to_the_parents_answers() -> None:
    source = some_images(200)
    teacher = network(1)
    training.fit(teacher, source, settings(), epochs=5, lr=0.1, stream=(0,))
    student = network(1).load_weights(teacher.weights() | {"4.weight": network(2).get_parameter("4.weight").detach()})

    def gap() -> float:
        with torch.no_grad():
            return float((student(source.first(200)) - teacher(source.first(200))).abs().mean())

    before = gap()
    loss: Callable[[Tensor, Batch], Tensor] = training.distillation(teacher, 3.0)
    training.fit(student, source, settings(), epochs=5, lr=0.05, stream=(1,), loss_of=loss, only={4, 5})
    assert gap() < before / 3


def test_a_skip_is_trained_from_zero() -> None:
    skip = chain([Input(), Conv(6, 3), BatchNorm(), ReLU(), Conv(6, 3), ReLU(), Add(), GlobalPool(), Linear()])
    nodes = tuple(replace(node, inputs=(5, 3)) if isinstance(node.op, Add) else node for node in skip.nodes)
    net = network(0, Graph(nodes, skip.next_id))
    training.fit(net, some_images(), settings(), epochs=2, lr=0.1, stream=(0,))
    assert abs(net.get_parameter("6.lam").item()) > 1e-4


def test_statistics_come_from_a_histogram_and_arrays_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (37, 3, 5, 4), dtype=np.uint8)
    images[:, 2] = 7
    monkeypatch.setattr(training, "COUNTED", 100)
    mean, std = training._statistics(images)
    assert np.allclose(mean, images.mean(axis=(0, 2, 3)), rtol=1e-12)
    assert np.allclose(std, np.maximum(images.std(axis=(0, 2, 3)), 1.0), rtol=1e-12)
