"""Inside the image, every command of Slurm's: hands its words to the helper outside and says what that one says.

Decides nothing. Installed under the names of the commands, in a folder that only the helper puts on PATH.
"""

from __future__ import annotations

import json
import os
import socket
import sys

SOCKET = "LEMONADE_SOCKET"
"""Names the helper's socket."""
NO_HELPER = 127


def main() -> int:
    """Ask the helper; the exit code of the command it has run."""
    name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
    reads = name == "sbatch" and all(word.startswith("-") for word in words)
    request = {"command": [name, *words], "cwd": os.getcwd(), "input": sys.stdin.read() if reads else ""}
    try:
        with socket.socket(socket.AF_UNIX) as helper:
            helper.connect(os.environ[SOCKET])
            helper.sendall(json.dumps(request).encode() + b"\n")
            helper.shutdown(socket.SHUT_WR)
            with helper.makefile("rb") as told:
                answer = json.loads(told.read())
    except (KeyError, OSError, ValueError) as error:
        why = f"nothing outside the image answers: the helper has gone ({type(error).__name__})"
        print(f"{name}: {why}", file=sys.stderr)
        return NO_HELPER
    sys.stdout.write(answer["out"])
    sys.stderr.write(answer["err"])
    return int(answer["code"])


if __name__ == "__main__":
    sys.exit(main())
