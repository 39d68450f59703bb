"""Who may import whom: the table of the design, enforced on the import statements of every module.

The rings keep the search free of torch and files, and the coordinator light enough for a login node.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lemonade_hpc

PACKAGE = Path(lemonade_hpc.__file__).parent
NAME = "lemonade_hpc"
LEAVES = {"config", "files", "data"}

ALLOWED: dict[str, set[str]] = {
    "search": {"numpy", "scipy", "moocore", "search", *LEAVES},
    "learn": {"numpy", "torch", "torchvision", "safetensors", "learn", "search", *LEAVES},
    "run": {"numpy", "h5py", "submitit", "run", "search", "explain", *LEAVES},
    "view": {"numpy", "matplotlib", "rich", "pydantic", "view", "search", "run", *LEAVES},
    "config": {"pydantic", "yaml", "explain", "files"},
    "explain": {"pydantic", "yaml"},
    "files": set(),
    "data": {"numpy", "sklearn", "mlxtend", "config"},
    "cli": {"typer", "view", "run", "search", "explain", *LEAVES},
    "__init__": set(),
    "__main__": {"cli"},
}
"""For each folder or top-level module, what it may import besides the standard library.

`view` has pydantic since it writes the configuration's fields out as a commented file.
"""


def imported(source: str) -> set[str]:
    """Everything that a module imports, wherever the statement stands: a package, or a part of ours (`search`)."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative imports hide what is imported"
            found |= {f"{NAME}.{alias.name}" for alias in node.names} if node.module == NAME else {node.module}
    ours = {name.split(".")[1] for name in found if name.startswith(f"{NAME}.")}
    return (ours | {name.split(".")[0] for name in found}) - {NAME, "__version__"}


def forbidden(ring: str, source: str) -> set[str]:
    """What a module of this ring imports without being allowed to."""
    return imported(source) - ALLOWED[ring] - set(sys.stdlib_module_names)


def ring_of(path: Path) -> str:
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_what_its_ring_may(path: Path) -> None:
    assert ring_of(path) in ALLOWED, f"{path.name} is in no ring"
    assert forbidden(ring_of(path), path.read_text()) == set()


def test_every_ring_has_modules() -> None:
    assert {"search", "learn", "run", "view", *LEAVES} <= {ring_of(path) for path in MODULES}


@pytest.mark.parametrize(
    ("ring", "source", "found"),
    [
        ("search", "import torch", {"torch"}),
        ("search", "from lemonade_hpc.learn import network", {"learn"}),
        ("search", "from lemonade_hpc import run, files", {"run"}),
        ("run", "def later():\n    import torch.nn as nn", {"torch"}),
        ("run", "if TYPE_CHECKING:\n    from lemonade_hpc.learn.child import main", {"learn"}),
        ("run", "import lemonade_hpc.view.tables", {"view"}),
        ("learn", "import h5py, json", {"h5py"}),
        ("files", "from numpy.typing import NDArray", {"numpy"}),
        ("data", "from lemonade_hpc.files import write", {"files"}),
        ("search", "import numpy.linalg\nfrom lemonade_hpc.search import ops\nimport json", set()),
    ],
)
def test_the_check_finds_what_it_is_there_for(ring: str, source: str, found: set[str]) -> None:
    assert forbidden(ring, source) == found


def test_the_check_refuses_relative_imports() -> None:
    with pytest.raises(AssertionError, match="relative"):
        imported("from . import ops")


def loaded_after(modules: list[str]) -> set[str]:
    code = f"import sys, {', '.join(modules)}; print(*(name for name in sys.modules if '.' not in name))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_importing_the_search_and_the_coordinator_loads_no_torch() -> None:
    """At run time too: not through any third package either."""
    rings = [path for path in MODULES if ring_of(path) in ("search", "run") and path.stem != "__init__"]
    names = [".".join((NAME, *path.relative_to(PACKAGE).with_suffix("").parts)) for path in rings]
    loaded = loaded_after(names)
    assert "numpy" in loaded and not loaded & {"torch", "torchvision", "matplotlib", "sklearn"}


def test_the_check_of_what_is_loaded_can_fail() -> None:
    assert "torch" in loaded_after([f"{NAME}.learn.network"])
