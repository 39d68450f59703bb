"""Writes `requirements-cuda.txt` or `requirements-cpu.txt`: what the project needs now, by version and checksum.

Called by `containers/build --lock`, with the options that name the image's Python. pip resolves; nothing is installed.
"""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CPU = ["torch==2.13.0+cpu"]
"""Is found where pip is told of PyTorch's own index of wheels without CUDA (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS)."""
NOT_ON_CPU = {"torchvision"}
"""Is needed by nothing that runs in the image, and PyPI has it for torch with CUDA only."""


def main(variant: str, target: list[str]) -> None:
    """Resolve, and write the list."""
    wanted = [str(HERE.parent), *(CPU if variant == "cpu" else [])]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    done = subprocess.run([*pip, "--target", "unused", *target, *wanted], stdout=subprocess.PIPE, check=True)
    lines = []
    for item in json.loads(done.stdout)["install"]:
        name, version = item["metadata"]["name"].lower(), item["metadata"]["version"]
        if name == "torch" and ("+cpu" in version) != (variant == "cpu"):
            sys.exit(f"error: pip takes torch {version} for the {variant} image; tell it of another index, or of none")
        if name != "lemonade-hpc" and not (variant == "cpu" and name in NOT_ON_CPU):
            lines.append(f"{name}=={version} --hash=sha256:{item['download_info']['archive_info']['hashes']['sha256']}")
    (HERE / f"requirements-{variant}.txt").write_text("\n".join([*sorted(lines), ""]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
