"""Training, distillation and evaluation of one network on images that live on the device.

Decides: the loop (paper, appendix on the training pipeline: SGD with momentum, cosine rate to 0, mixup, cutout) and the
augmentation, done by the batch on uint8 images. Every random number comes from `default_rng([seed, purpose, child,
epoch])`, so an epoch can be repeated alone. Shape suffixes: B batch, C channels, H height, W width, K classes.
"""

# ruff: noqa: N815 (fields carry shape suffixes)

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import cos, pi

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

# The functional form: constructing torch.optim.SGD imports torch._dynamo, 1.1-1.5 s in every fresh process.
from torch.optim.sgd import sgd

from lemonade_hpc.config import Training
from lemonade_hpc.data import DataSet, Part
from lemonade_hpc.learn.network import Network

EVAL_BATCH = 1024


class Diverged(RuntimeError):  # noqa: N818
    """The loss or a weight is no longer finite: the child's own fault."""


@dataclass(frozen=True)
class Images:
    """One part of a data set on the device: uint8 images (N, C, H, W), labels (N,), and the normalisation."""

    images: Tensor
    labels: Tensor
    mean_1C11: Tensor
    std_1C11: Tensor

    def normalise(self, x_BCHW: Tensor) -> Tensor:
        """uint8 to float32 with mean 0 and deviation 1 per channel over the training images."""
        return (x_BCHW.float() - self.mean_1C11) / self.std_1C11

    def first(self, count: int, skip: int = 0) -> Tensor:
        """Normalised images, unaugmented, from a fixed place; fewer where there are fewer."""
        return self.normalise(self.images[skip : skip + count])


def place(data: DataSet, part: Part, device: torch.device) -> Images:
    """Move a part of the data to the device; it is normalised by the training part's statistics."""
    mean, std = (torch.from_numpy(one.astype(np.float32)).to(device) for one in _statistics(data.train.images))
    with warnings.catch_warnings():  # the arrays are read-only, and nobody writes to them: no copy is made of them
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        images, labels = (torch.from_numpy(a).to(device) for a in (part.images, part.labels))
    return Images(images, labels, mean[None, :, None, None], std[None, :, None, None])


COUNTED = 2**24
"""Pixels that are counted at a time."""


def _statistics(images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and standard deviation (at least 1) of each channel of uint8 images (N, C, H, W), from their histogram.

    Exact, and takes no memory to speak of, however many images there are.
    """
    num, channels, height, width = images.shape
    counts = np.zeros((channels, 256), np.int64)
    step = max(1, COUNTED // (height * width))
    for first in range(0, num, step):
        for channel in range(channels):
            counts[channel] += np.bincount(images[first : first + step, channel].reshape(-1), minlength=256)
    values = np.arange(256.0)
    mean = counts @ values / counts.sum(axis=1)
    variance = (counts * (values - mean[:, None]) ** 2).sum(axis=1) / counts.sum(axis=1)
    return mean, np.maximum(np.sqrt(variance), 1.0)


@dataclass(frozen=True)
class Batch:
    """Augmented images (B, C, H, W), labels (B,), and mixup's partner labels with the share of the first ones."""

    x_BCHW: Tensor
    labels_B: Tensor
    partners_B: Tensor
    share: float


def augment(data: Images, index: np.ndarray, training: Training, rng: np.random.Generator) -> Batch:
    """Pad-crop, flip, cutout and mixup of the images at `index`, in this order.

    Each image has its own draw; mixup has one share per batch, and a partner for each image.
    """
    x = data.images
    count, (height, width), device = len(index), x.shape[2:], x.device
    at = torch.from_numpy(index).to(device)
    if training.pad:
        x = crop(x, at, training.pad, rng)
    else:
        x = x[at]
    if training.flip:
        chosen = torch.from_numpy(rng.random(count) < 0.5).to(device)
        x = torch.where(chosen[:, None, None, None], x.flip(3), x)
    x = data.normalise(x)
    if training.cutout:
        x = x * ~_squares(count, height, width, training.cutout, rng).to(device)
    labels = data.labels[at]
    if not training.mixup:
        return Batch(x, labels, labels, 1.0)
    share = float(rng.beta(training.mixup, training.mixup))
    partner = torch.from_numpy(rng.permutation(count)).to(device)
    return Batch(torch.lerp(x[partner], x, share), labels, labels[partner], share)


def crop(images: Tensor, at: Tensor, pad: int, rng: np.random.Generator) -> Tensor:
    """Take the images at `at`, padded with zeros and cropped to their size at a random place each."""
    height, width = images.shape[2:]
    padded = F.pad(images[at], (pad, pad, pad, pad))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, top, left, H, W), a view
    top, left = torch.from_numpy(rng.integers(0, 2 * pad + 1, size=(2, len(at)))).to(images.device)
    return windows[torch.arange(len(at), device=images.device), :, top, left]


def _squares(count: int, height: int, width: int, side: int, rng: np.random.Generator) -> Tensor:
    """Masks (count, 1, H, W), true in a square of this side around a random pixel; it may stick out."""
    y, x = rng.integers(0, height, size=count), rng.integers(0, width, size=count)
    top, left = y - side // 2, x - side // 2
    rows, columns = np.arange(height), np.arange(width)
    in_rows = (rows >= top[:, None]) & (rows < top[:, None] + side)
    in_columns = (columns >= left[:, None]) & (columns < left[:, None] + side)
    return torch.from_numpy((in_rows[:, :, None] & in_columns[:, None, :])[:, None])


Loss = Callable[[Tensor, Batch], Tensor]


def cross_entropy(logits_BK: Tensor, batch: Batch) -> Tensor:
    """Mixup's cross entropy: the labels' and the partners', by their shares."""
    loss = F.cross_entropy(logits_BK, batch.labels_B)
    if batch.share == 1.0:
        return loss
    return batch.share * loss + (1 - batch.share) * F.cross_entropy(logits_BK, batch.partners_B)


def distillation(teacher: Network, temperature: float) -> Loss:
    """Divergence from the teacher's softened answers on the same augmented images (Hinton et al., 2015)."""

    def loss(logits_BK: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            target_BK = F.log_softmax(teacher(batch.x_BCHW) / temperature, dim=1)
        answer_BK = F.log_softmax(logits_BK / temperature, dim=1)
        return F.kl_div(answer_BK, target_BK, reduction="batchmean", log_target=True) * temperature**2

    return loss


@dataclass(frozen=True)
class Moment:
    """Between two batches: all that the rest of a training depends on, beside the network's weights.

    `batch`: how many of the epoch's batches are done. `momenta`: one for each trained parameter, in order; none before
    the first step. `total`: the sum of the epoch's losses, on the device. `rng`: the epoch's generator after those
    batches; None where the epoch has not begun.
    """

    epoch: int = 0
    batch: int = 0
    momenta: Sequence[Tensor | None] = ()
    total: Tensor | None = None
    rng: np.random.Generator | None = None


def batches_of(data: Images, training: Training) -> int:
    """How many batches an epoch has."""
    return -(-len(data.labels) // training.batch_size)


def trained(network: Network, only: Collection[int] | None = None) -> dict[str, Tensor]:
    """The parameters that are trained, by name and in order; `only`: of these nodes."""
    return {name: p for name, p in network.named_parameters() if only is None or int(name.split(".")[0]) in only}


def fit(
    network: Network,
    data: Images,
    training: Training,
    *,
    epochs: int,
    lr: float,
    stream: tuple[int, ...],
    loss_of: Loss = cross_entropy,
    only: Collection[int] | None = None,
    begin: Moment = Moment(),  # noqa: B008 - frozen
    progress: Callable[[int], None] | None = None,
    watch: Callable[[Moment], None] | None = None,
) -> None:
    """Train in place for `epochs`, SGD with a cosine rate from `lr` to 0.

    `stream` seeds an epoch's draws together with its number; `only`: the nodes that are trained, all others frozen.
    `begin`: where an earlier call was that gave the network its weights; `watch` is called after every batch.
    Statistics of BatchNorms are no training and follow the data everywhere: frozen at those of a parent that an
    approximate operator has just disturbed, distillation diverges or ends at twice the error (measured on digits).
    Raises Diverged when the loss of an epoch is not finite.
    """
    chosen = list(trained(network, only).values())
    momenta: list[Tensor | None] = list(begin.momenta) or [None] * len(chosen)
    num_batches = batches_of(data, training)
    network.train()
    for epoch in range(begin.epoch, epochs):
        rng = np.random.default_rng([*stream, epoch])
        batches = np.array_split(rng.permutation(len(data.labels)), num_batches)
        done, total = 0, torch.zeros((), device=data.images.device)
        if begin.rng is not None and begin.total is not None and epoch == begin.epoch:
            done, total, rng = begin.batch, begin.total.clone(), begin.rng
        for k in range(done, num_batches):
            rate = lr * (1 + cos(pi * (epoch * num_batches + k) / (epochs * num_batches))) / 2
            batch = augment(data, batches[k], training, rng)
            loss = loss_of(network(batch.x_BCHW), batch)
            gradients = torch.autograd.grad(loss, chosen)
            with torch.no_grad():
                _step(chosen, list(gradients), momenta, training, rate)
                total += loss.detach()
            if watch is not None and k + 1 < num_batches:
                watch(Moment(epoch, k + 1, momenta, total, rng))
        if not bool(torch.isfinite(total)):
            raise Diverged(f"the loss is {float(total) / num_batches} in epoch {epoch + 1} of {epochs}")
        if progress is not None:
            progress(epoch + 1)
        if watch is not None:
            watch(Moment(epoch + 1, 0, momenta))
    network.eval()


def _step(
    params: list[Tensor], gradients: list[Tensor], momenta: list[Tensor | None], training: Training, rate: float
) -> None:
    assert training.weight_decay is not None
    sgd(
        params,
        gradients,
        momenta,
        foreach=True,
        weight_decay=training.weight_decay,
        momentum=training.momentum,
        lr=rate,
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )


def error(network: Network, data: Images) -> float:
    """Share of images that the network, in evaluation mode, takes for another class; raises Diverged."""
    network.eval()
    wrong = 0
    with torch.no_grad():
        for start in range(0, len(data.labels), EVAL_BATCH):
            logits_BK = network(data.normalise(data.images[start : start + EVAL_BATCH]))
            if not bool(torch.isfinite(logits_BK).all()):
                raise Diverged("the network's answers are not finite")
            wrong += int((logits_BK.argmax(dim=1) != data.labels[start : start + EVAL_BATCH]).sum())
    return wrong / len(data.labels)
