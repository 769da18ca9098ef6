"""Print environment.yml: the versions of requirements.lock for conda users and for Binder.

pip refuses to install the project itself beside a file with hashes, and Binder runs nothing but
this one file; so the versions are listed here without their hashes, and a test keeps them equal.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = """\
# Written by `make lock` from requirements.lock; do not edit.
name: hallulib
channels:
  - conda-forge
dependencies:
  - python=3.11
  - pip
  - pip:
"""


def pins(lock: str) -> list[str]:
    """The requirements of a lock file, with their markers, without their hashes."""
    return [
        line.removesuffix("\\").strip()
        for line in lock.splitlines()
        if re.match(r"[A-Za-z0-9]", line)
    ]


def environment(lock: str) -> str:
    """The text of environment.yml."""
    lines = [f'      - "{pin}"' for pin in pins(lock)]
    return HEAD + "\n".join([*lines, '      - "-e ."']) + "\n"


if __name__ == "__main__":
    print(environment((ROOT / "requirements.lock").read_text()), end="")
