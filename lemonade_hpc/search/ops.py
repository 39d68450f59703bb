"""The operators a network is built of, and what each knows of itself: shape, weights, multiply-adds.

Decides: the closed set of operators. An operator is a frozen value; `facts` is the one place that shapes, parameter
counts and multiply-adds come from. Never touches a weight. Shapes are per image: (C, H, W) for feature maps, (C,)
for vectors. One test per operator ties this registry to the real torch module.

Each weight states the role of every axis: `o` the node's output channels, `i` its input channels, `c` channel by
channel, `.` free. Growing and pruning need no code per operator: they touch each axis whose role reads the channels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from math import prod
from typing import Any, ClassVar

Shape = tuple[int, ...]

BN_EPS = 1e-5
"""Added to a BatchNorm's variance; exactness of an inserted BatchNorm rests on it (torch's default)."""


class ShapeError(ValueError):
    """An operator cannot take these inputs."""


@dataclass(frozen=True, slots=True)
class Signature:
    """What a network is judged on: image shape (C, H, W) and number of classes. Not part of the graph."""

    image: Shape
    num_classes: int


@dataclass(frozen=True, slots=True)
class Param:
    """One weight of an operator: its name, shape, axis roles, how new entries start, whether training changes it."""

    name: str
    shape: Shape
    roles: str
    fill: str
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Facts:
    """What an operator is on given inputs: output shape, weights, parameter count, multiply-adds per image."""

    shape: Shape
    params: tuple[Param, ...]
    num_params: int
    macs: int


@dataclass(frozen=True)
class Op:
    """An operator. Subclasses are final; `channelwise` ones keep channels apart, so that groups flow through them."""

    name: ClassVar[str]
    arity: ClassVar[int] = 1
    channelwise: ClassVar[bool] = False

    @cached_property
    def text(self) -> str:
        """The operator in words, `conv 16 3`: what digests are taken over."""
        return " ".join(map(str, (self.name, *vars(self).values())))

    def shape(self, signature: Signature, *inputs: Shape) -> Shape:
        """Output shape; raises ShapeError."""
        raise NotImplementedError

    def params(self, signature: Signature, *inputs: Shape) -> tuple[Param, ...]:
        """The weights, in the order of the state dict."""
        return ()

    def macs(self, signature: Signature, *inputs: Shape) -> int:
        """Multiply-adds per image, of convolutions and matrix products only (as torch's flop counter / 2)."""
        return 0


def _feature_map(op: Op, shape: Shape) -> Shape:
    if len(shape) != 3:
        raise ShapeError(f"{op.name} needs a feature map (C, H, W), got {shape}")
    return shape


def _odd(op: Op, kernel: int) -> None:
    if kernel < 1 or kernel % 2 == 0:
        raise ShapeError(f"{op.name} needs an odd kernel, got {kernel}")


@dataclass(frozen=True)
class Input(Op):
    """The image."""

    name: ClassVar[str] = "input"
    arity: ClassVar[int] = 0

    def shape(self, signature: Signature, *inputs: Shape) -> Shape:  # noqa: D102
        return signature.image


@dataclass(frozen=True)
class Conv(Op):
    """Convolution without bias, stride 1, padded to keep height and width; `kernel` is odd."""

    name: ClassVar[str] = "conv"
    channels: int
    kernel: int

    def shape(self, signature: Signature, *inputs: Shape) -> Shape:  # noqa: D102
        _, height, width = _feature_map(self, inputs[0])
        _odd(self, self.kernel)
        if self.channels < 1:
            raise ShapeError(f"{self.name} needs at least one channel, got {self.channels}")
        return (self.channels, height, width)

    def params(self, signature: Signature, *inputs: Shape) -> tuple[Param, ...]:  # noqa: D102
        shape = (self.channels, inputs[0][0], self.kernel, self.kernel)
        return (Param("weight", shape, "oi..", "fan_in"),)

    def macs(self, signature: Signature, *inputs: Shape) -> int:  # noqa: D102
        channels, height, width = inputs[0]
        return self.channels * channels * self.kernel**2 * height * width


@dataclass(frozen=True)
class Depthwise(Op):
    """One filter per channel, without bias, stride 1, padded to keep height and width; `kernel` is odd."""

    name: ClassVar[str] = "depthwise"
    channelwise: ClassVar[bool] = True
    kernel: int

    def shape(self, signature: Signature, *inputs: Shape) -> Shape:  # noqa: D102
        _odd(self, self.kernel)
        return _feature_map(self, inputs[0])

    def params(self, signature: Signature, *inputs: Shape) -> tuple[Param, ...]:  # noqa: D102
        return (Param("weight", (inputs[0][0], 1, self.kernel, self.kernel), "c...", "fan_in"),)

    def macs(self, signature: Signature, *inputs: Shape) -> int:  # noqa: D102
        return prod(inputs[0]) * self.kernel**2


@dataclass(frozen=True)
class BatchNorm(Op):
    """Normalisation over batch and space; its running statistics are weights that training does not count."""

    name: ClassVar[str] = "batchnorm"
    channelwise: ClassVar[bool] = True

    def shape(self, signature: Signature, *inputs: Shape) -> Shape:  # noqa: D102
        return _feature_map(self, inputs[0])

    def params(self, signature: Signature, *inputs: Shape) -> tuple[Param, ...]:  # noqa: D102
        channels = (inputs[0][0],)
        return (
            Param("weight", channels, "c", "one"),
            Param("bias", channels, "c", "zero"),
            Param("running_mean", channels, "c", "zero", trained=False),
            Param("running_var", channels, "c", "one", trained=False),
        )


@dataclass(frozen=True)
class ReLU(Op):
    """max(x, 0)."""

    name: ClassVar[str] = "relu"
    channelwise: ClassVar[bool] = True

    def shape(self, signature: Signature, *inputs: Shape) -> Shape:  # noqa: D102
        return inputs[0]


@dataclass(frozen=True)
class MaxPool(Op):
    """2x2 max-pooling with stride 2: the only place where height and width change."""

    name: ClassVar[str] = "maxpool"
    channelwise: ClassVar[bool] = True

    def shape(self, signature: Signature, *inputs: Shape) -> Shape:  # noqa: D102
        channels, height, width = _feature_map(self, inputs[0])
        if min(height, width) < 2:
            raise ShapeError(f"maxpool needs at least 2x2 pixels, got {height}x{width}")
        return (channels, height // 2, width // 2)


@dataclass(frozen=True)
class GlobalPool(Op):
    """Mean over height and width: a feature map to a vector."""

    name: ClassVar[str] = "globalpool"
    channelwise: ClassVar[bool] = True

    def shape(self, signature: Signature, *inputs: Shape) -> Shape:  # noqa: D102
        return _feature_map(self, inputs[0])[:1]


@dataclass(frozen=True)
class Linear(Op):
    """The classifier: a vector to one logit per class."""

    name: ClassVar[str] = "linear"

    def shape(self, signature: Signature, *inputs: Shape) -> Shape:  # noqa: D102
        if len(inputs[0]) != 1:
            raise ShapeError(f"linear needs a vector (C,), got {inputs[0]}")
        return (signature.num_classes,)

    def params(self, signature: Signature, *inputs: Shape) -> tuple[Param, ...]:  # noqa: D102
        weight = Param("weight", (signature.num_classes, inputs[0][0]), "oi", "fan_in")
        return (weight, Param("bias", (signature.num_classes,), "o", "zero"))

    def macs(self, signature: Signature, *inputs: Shape) -> int:  # noqa: D102
        return signature.num_classes * inputs[0][0]


@dataclass(frozen=True)
class Add(Op):
    """The convex skip (1 - lam) x + lam y; lam is a raw learnable number that starts at 0 (paper, section 3)."""

    name: ClassVar[str] = "add"
    arity: ClassVar[int] = 2
    channelwise: ClassVar[bool] = True

    def shape(self, signature: Signature, *inputs: Shape) -> Shape:  # noqa: D102
        if inputs[0] != inputs[1]:
            raise ShapeError(f"add needs equal shapes, got {inputs[0]} and {inputs[1]}")
        return inputs[0]

    def params(self, signature: Signature, *inputs: Shape) -> tuple[Param, ...]:  # noqa: D102
        return (Param("lam", (), "", "zero"),)


@dataclass(frozen=True)
class Concat(Op):
    """Channels of x, then channels of y."""

    name: ClassVar[str] = "concat"
    arity: ClassVar[int] = 2
    channelwise: ClassVar[bool] = True

    def shape(self, signature: Signature, *inputs: Shape) -> Shape:  # noqa: D102
        (c_x, *space_x), (c_y, *space_y) = inputs
        if space_x != space_y:
            raise ShapeError(f"concat needs equal height and width, got {inputs[0]} and {inputs[1]}")
        return (c_x + c_y, *space_x)


OPS: dict[str, type[Op]] = {
    op.name: op for op in (Input, Conv, Depthwise, BatchNorm, ReLU, MaxPool, GlobalPool, Linear, Add, Concat)
}


@lru_cache(maxsize=10_000)
def facts(op: Op, signature: Signature, *inputs: Shape) -> Facts:
    """What `op` is on these inputs; raises ShapeError. Remembered, since a search asks it again and again."""
    shape = op.shape(signature, *inputs)
    params = op.params(signature, *inputs)
    count = sum(prod(param.shape) for param in params if param.trained)
    return Facts(shape, params, count, op.macs(signature, *inputs))


def to_json(op: Op) -> list[Any]:
    """`["conv", 16, 3]`: the name, then the fields in order."""
    name, *numbers = op.text.split()
    return [name, *map(int, numbers)]


def from_json(data: list[Any]) -> Op:
    """The inverse of `to_json`; raises ValueError for an unknown operator or wrong fields."""
    if not isinstance(data, list) or not data or not isinstance(data[0], str):
        raise ValueError(f"an operator is a list that begins with its name, got {data!r}")
    name, *numbers = data
    if name not in OPS:
        raise ValueError(f"unknown operator {name!r}; known are {', '.join(OPS)}")
    wanted = len(fields(OPS[name]))
    if len(numbers) != wanted or any(type(number) is not int for number in numbers):
        raise ValueError(f"operator {name!r} takes {wanted} whole numbers, got {numbers}")
    return OPS[name](*numbers)
