"""Compares this project with tensors dumped from the reference implementation.

    python tools/check_parity.py DIR [--failures-only]

DIR holds ``case_*.pt`` and ``units.pt`` (or ``.pt.xz``). Every entry of every file gets a line.
Exit status: 0 if all agree, 1 if an entry differs or was not compared, 2 if there is nothing to
compare. See docs/fidelity.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# The comparisons are part of the tests of this checkout, and they are of its package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from co_detr.process_setup import silence_dependencies

silence_dependencies()

from tests.parity.oracle.check import check_file
from tests.parity.oracle.golden import golden_files
from tests.parity.oracle.report import format_file, format_summary


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, help="folder with case_*.pt and units.pt")
    parser.add_argument("--failures-only", action="store_true", help="print only what is not ok")
    options = parser.parse_args(arguments)
    files = golden_files(options.directory) if options.directory.is_dir() else []
    if not files:
        message = "holds no golden file; name the folder with case_*.pt or units.pt."
        print(f"{options.directory} {message}", file=sys.stderr)
        return 2
    reports = {}
    for path in files:
        reports[path.name] = check_file(path)
        print(format_file(path.name, reports[path.name], options.failures_only), flush=True)
    print(format_summary(reports))
    failures = sum(len(report.failures) for report in reports.values())
    print(f"\nFAIL: {failures} entries" if failures else "\nPASS")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
