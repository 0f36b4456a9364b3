"""Compares this project with tensors dumped from the reference implementation.

    python tools/check_parity.py DIR [--failures-only]

DIR holds ``case_*.pt`` and ``units.pt``. Every entry of every file gets a line; the exit status
is 1 if one differs or was not compared.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from co_detr.noise import silence_dependencies

silence_dependencies()

from co_detr.parity.check import check_file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, help="folder with case_*.pt and units.pt")
    parser.add_argument("--failures-only", action="store_true", help="print only what is not ok")
    arguments = parser.parse_args()
    files = sorted(arguments.directory.glob("*.pt"))
    if not files:
        print(f"{arguments.directory} holds no .pt file; give the folder with the golden cases.")
        return 2
    totals: Counter[str] = Counter()
    for path in files:
        report = check_file(path)
        counts = Counter(line.status for line in report.lines)
        print(f"== {path.name}: " + ", ".join(f"{n} {status}" for status, n in counts.items()))
        for line in report.lines:
            if line.status == "FAIL" or not arguments.failures_only:
                print(line)
        totals += counts
    print("== all files: " + ", ".join(f"{n} {status}" for status, n in totals.items()))
    return 1 if totals["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(main())
