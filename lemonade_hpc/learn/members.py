"""Trained members of a front as torch modules, and their test error.

Decides: the form of a stored network: a safetensors file whose metadata hold graph, signature and normalisation, so
that it needs nothing else to be used. `evaluate` is the only code that measures on the test images.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lemonade_hpc import config as configs
from lemonade_hpc import data as data_sets
from lemonade_hpc import files
from lemonade_hpc.learn.network import Network, build
from lemonade_hpc.learn.training import Diverged, Images, error, place
from lemonade_hpc.search import graph as graphs
from lemonade_hpc.search.graph import Graph
from lemonade_hpc.search.ops import Signature

KEY = "lemonade_hpc"


class Member(nn.Module):
    """A trained network with its normalisation: images (B, C, H, W) with values 0 to 255 in, logits (B, K) out."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Network, graph: Graph, mean_1C11: Tensor, std_1C11: Tensor) -> None:
        super().__init__()
        self.network, self.graph = network, graph
        self.register_buffer("mean", mean_1C11)
        self.register_buffer("std", std_1C11)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, K). Raises ValueError for images of another shape than (B, C, H, W), C as in training."""
        if x_BCHW.ndim != 4 or x_BCHW.shape[1] != self.mean.shape[1]:
            raise ValueError(f"images have the shape {tuple(x_BCHW.shape)}; expected (B, {self.mean.shape[1]}, H, W)")
        logits_BK: Tensor = self.network((x_BCHW.float() - self.mean) / self.std)
        return logits_BK


def encode(network: Network, graph: Graph, signature: Signature, data: Images) -> bytes:
    """The bytes of a stored network."""
    about = {
        "graph": graphs.to_json(graph),
        "image": signature.image,
        "num_classes": signature.num_classes,
        "mean": data.mean_1C11.flatten().tolist(),
        "std": data.std_1C11.flatten().tolist(),
    }
    # One key: safetensors writes several in any order, and equal networks must give equal bytes.
    return save(
        {name: value.cpu().contiguous() for name, value in network.weights().items()}, {KEY: files.dumps(about)}
    )


def load(path: str | Path) -> Member:
    """A stored network, ready to use, in evaluation mode; `path` as `front --json` gives it, inside the run folder.

    Raises FileNotFoundError, or ValueError for a file that holds no stored network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; `lemonade-hpc front DIR --json` names those of the front")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[KEY])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: not a network that a search has stored ({error})") from error
    graph = graphs.from_json(about["graph"])
    network = build(graph, Signature(tuple(about["image"]), about["num_classes"]), weights)
    mean, std = (torch.tensor(about[name])[None, :, None, None] for name in ("mean", "std"))
    return Member(network, graph, mean, std).eval()


class Damaged(ValueError):  # noqa: N818
    """A file of weights is not the one that was stored."""


def evaluate(run: Path, data_from: configs.Data, stored: dict[str, str]) -> list[float]:
    """Test error of stored networks of a run, as a share of the test images; `stored`: their paths and checksums.

    Raises ConfigError for other data, Damaged for a file that is not what its checksum says.
    """
    for path, sha256 in stored.items():
        if files.sha256((run / path).read_bytes()) != sha256:
            raise Damaged(f"{run / path}: damaged or replaced, its SHA-256 is not the one in the record")
    data = data_sets.load(data_from)
    if data.checksum != json.loads((run / files.RUN).read_text())["data"]["checksum"]:
        source = data_from.root or data_from.name
        raise configs.ConfigError(f"{source}: not the data that {run} was started with (checksum differs)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    test = place(data, data.test, device)
    return [error(load(run / path).network.to(device), test) for path in stored]


def main(arguments: list[str]) -> None:
    """`members RUN DATA PATH SHA256 ...`, DATA the configuration's section: prints a JSON list of test errors."""
    run, data, *stored = arguments
    torch.set_num_threads(1)
    try:
        data_from = configs.Data.model_validate_json(data)
        print(json.dumps(evaluate(Path(run), data_from, dict(zip(stored[::2], stored[1::2], strict=True)))))
    except (ValueError, Diverged, OSError) as problem:
        sys.exit(f"error: {problem}")


if __name__ == "__main__":
    main(sys.argv[1:])
