"""The torch module of a graph: a small interpreter over its nodes.

Decides: how each operator is computed, and that a weight is called "{id}.{param}". Takes no decision on weights' values
(`transfer.py`) nor on training (`training.py`). Shape suffixes: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lemonade_hpc.search import ops
from lemonade_hpc.search.graph import Graph, validate
from lemonade_hpc.search.ops import Shape, Signature

Weights = dict[str, Tensor]


class ConvexSum(nn.Module):
    """(1 - lam) x + lam y with a raw learnable lam (paper, section 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.lam = nn.Parameter(torch.zeros(()))

    def forward(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        """Mix two feature maps of one shape."""
        return torch.lerp(x_BCHW, y_BCHW, self.lam)


class ConcatChannels(nn.Module):
    """Channels of x, then of y."""

    def forward(self, x_BCHW: Tensor, y_BDHW: Tensor) -> Tensor:
        """(B, C + D, H, W)."""
        return torch.cat((x_BCHW, y_BDHW), dim=1)


class GlobalMean(nn.Module):
    """Mean over height and width."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C)."""
        return x_BCHW.mean(dim=(2, 3))


def _conv(op: ops.Conv, shape: Shape, _: Signature) -> nn.Module:
    return nn.Conv2d(shape[0], op.channels, op.kernel, padding=op.kernel // 2, bias=False)


def _depthwise(op: ops.Depthwise, shape: Shape, _: Signature) -> nn.Module:
    return nn.Conv2d(shape[0], shape[0], op.kernel, padding=op.kernel // 2, groups=shape[0], bias=False)


def _batchnorm(op: ops.BatchNorm, shape: Shape, _: Signature) -> nn.Module:
    module = nn.BatchNorm2d(shape[0], eps=ops.BN_EPS)
    module.num_batches_tracked = None  # momentum is fixed, so the count is no weight
    return module


_BUILD: dict[type[ops.Op], Callable[[Any, Shape, Signature], nn.Module]] = {
    ops.Conv: _conv,
    ops.Depthwise: _depthwise,
    ops.BatchNorm: _batchnorm,
    ops.ReLU: lambda op, shape, signature: nn.ReLU(),
    ops.MaxPool: lambda op, shape, signature: nn.MaxPool2d(2),
    ops.GlobalPool: lambda op, shape, signature: GlobalMean(),
    ops.Linear: lambda op, shape, signature: nn.Linear(shape[0], signature.num_classes),
    ops.Add: lambda op, shape, signature: ConvexSum(),
    ops.Concat: lambda op, shape, signature: ConcatChannels(),
}


class Network(nn.Module):
    """A graph as a module from images (B, C, H, W), normalised floats, to logits (B, K).

    Parameters are not initialised to anything in particular: load them with `load_weights`.
    Raises GraphError or ShapeError for an invalid graph.
    """

    def __init__(self, graph: Graph, signature: Signature) -> None:
        super().__init__()
        facts = validate(graph, signature)
        last_use = {source: node.id for node in graph.nodes for source in node.inputs}
        self.image = graph.nodes[0].id
        self.steps: list[tuple[str, int, tuple[int, ...], tuple[int, ...]]] = []
        """In order of execution: a node's module name, its id, its inputs, and those that nobody reads after it."""
        for node in graph.nodes[1:]:
            name = str(node.id)
            self.add_module(name, _BUILD[type(node.op)](node.op, facts[node.inputs[0]].shape, signature))
            done = tuple(source for source in node.inputs if last_use[source] == node.id)
            self.steps.append((name, node.id, node.inputs, done))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, K)."""
        known = {self.image: x_BCHW}
        modules = self._modules
        out = x_BCHW
        for name, id_, inputs, done in self.steps:
            out = cast(nn.Module, modules[name])(*[known[source] for source in inputs])
            known[id_] = out
            for source in done:
                del known[source]
        return out

    def inputs_of(self, x_BCHW: Tensor, wanted: Collection[int]) -> dict[int, Tensor]:
        """For each wanted node (of one input), what it reads when the network sees these images."""
        found: dict[int, Tensor] = {}

        def note(id_: int) -> RemovableHandle:
            module = self.get_submodule(str(id_))
            return module.register_forward_pre_hook(lambda _, inputs: found.update({id_: inputs[0]}))

        hooks = [note(id_) for id_ in wanted]
        self(x_BCHW)
        for hook in hooks:
            hook.remove()
        return found

    def weights(self) -> Weights:
        """Copy all weights, running statistics included, by "{id}.{param}"."""
        return {name: value.detach().clone() for name, value in self.state_dict().items()}

    def load_weights(self, weights: Weights) -> Network:
        """Set all weights; raises ValueError for a missing, unknown or misshapen one."""
        own = self.state_dict()
        if own.keys() != weights.keys():
            raise ValueError(f"weights missing or unknown: {sorted(own.keys() ^ weights.keys())}")
        for name, value in own.items():
            if value.shape != weights[name].shape:
                raise ValueError(f"weight {name}: shape {tuple(weights[name].shape)}, needed {tuple(value.shape)}")
            value.copy_(weights[name])  # the state dict shares the parameters' memory
        return self


def build(graph: Graph, signature: Signature, weights: Weights) -> Network:
    """Make the network of a graph with these weights, in their dtype and on their device, in evaluation mode."""
    some = next(iter(weights.values()))
    network = Network(graph, signature).to(device=some.device, dtype=some.dtype)
    return network.load_weights(weights).eval()
