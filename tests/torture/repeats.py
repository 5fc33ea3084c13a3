"""The tests with cases that `make test` leaves out, as they say once more what others say.

python tests/torture/repeats.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> int:
    tests = ROOT / "tests"
    files = [
        path for path in tests.rglob("test_*.py") if "import repeats" in path.read_text(encoding="utf-8")
    ]
    words = [sys.executable, "-m", "pytest", "-n", "0", *map(str, sorted(files))]
    return subprocess.run(words, cwd=ROOT, env={**os.environ, "AVATARCTL_REPEATS": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main())
