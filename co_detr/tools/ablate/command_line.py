"""The command line of tools/ablate.py."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from co_detr.errors import ConfigError, WriteError
from co_detr.tools.ablate import NO_HEADS, OFF, ON

if TYPE_CHECKING:
    from co_detr.tools.ablate.grid import Grid, RunSpec
    from co_detr.tools.ablate.runner import Pace, Report

DESCRIPTION = """Trains the variants of a grid with their seeds, and compares them in one table.

The same command continues a grid that was interrupted. See docs/ablation.md."""

EPILOG = """
examples:
  grid file        python tools/ablate.py --grid configs/ablation/evidence.yaml \\
                       --output-dir output/evidence --jobs 2 data.train=a.json \\
                       data.train_images=images data.val=b.json data.val_images=images
  combinations     python tools/ablate.py --config-file configs/small/co_detr_small.py \\
                       --heads none atss roi roi+atss --positive-queries on off --lambda-2 1 2 \\
                       --seeds 0 1 2 --output-dir output/heads train.max_iter=1000

exit status: 0, also when the budget was used up before all runs were made; 1 if a run failed; 2
after an error that is explained in one sentence; 130 or 143 after Ctrl-C or SIGTERM.
"""

_AXES = ("heads", "positive_queries", "lambda_1", "lambda_2", "seeds")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of tools/ablate.py; overrides may stand before, between or behind flags."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--grid", metavar="FILE", help="YAML file with the variants")
    source.add_argument("--config-file", metavar="FILE", help="experiment, for combinations of:")
    add = parser.add_argument
    add("--heads", nargs="+", metavar="A+B", help=f"auxiliary heads; {NO_HEADS}: K = 0")
    add("--positive-queries", nargs="+", choices=(ON, OFF), help="customized positive queries")
    add("--lambda-1", nargs="+", type=float, metavar="W", help="loss weights of these queries")
    add("--lambda-2", nargs="+", type=float, metavar="W", help="loss weights of the heads")
    add("--seeds", nargs="+", type=int, metavar="N", help="of every combination (default: 0)")
    add("--output-dir", required=True, type=Path, metavar="DIR", help="tables, and all runs")
    add("--jobs", type=int, default=1, metavar="N", help="trainings at once (default: 1)")
    add("--threads-per-job", type=int, metavar="N", help="default: cores / jobs")
    add("--budget-hours", type=float, metavar="H", help="then trainings save and stop")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print the plan and what is done; no run")
    what.add_argument("--table-only", action="store_true", help="write the table again; no run")
    add("--debug", action="store_true", help="show the traceback of errors")
    add("opts", nargs="*", metavar="KEY=VALUE", help="override of a config key, for all runs")
    return parser.parse_intermixed_args(argv)


def run(options: argparse.Namespace) -> int:
    """Does what was asked; returns the exit status.

    Raises:
        UserError: if the grid, a config or a folder is wrong, or a file cannot be written.
    """
    try:
        return _run(options)
    except OSError as error:
        raise WriteError(
            f"{error.filename or options.output_dir} cannot be read or written ({error.strerror}): "
            "fix that; the same command continues the grid."
        ) from error


def _run(options: argparse.Namespace) -> int:
    from co_detr.tools.ablate.grid import check_configs, plan_runs
    from co_detr.tools.ablate.run import RunState
    from co_detr.tools.ablate.runner import Runner, exclusive

    pace = _pace(options)
    grid = _grid(options)
    specs = plan_runs(grid, options.output_dir)
    if options.table_only:
        if not options.output_dir.is_dir():
            raise ConfigError(f"{options.output_dir} does not exist: there are no runs yet.")
        print(_table(specs, options.output_dir), end="")
        return 0
    check_configs(grid)
    if options.list:
        for number, spec in enumerate(specs, start=1):
            print(f"{number:3}  {spec.title}: {RunState.read(spec).text()}")
        return 0
    with exclusive(options.output_dir) as lock:
        runner = Runner(specs, pace, lambda: _table(specs, options.output_dir), lock)
        report = runner.run()
        print(_table(specs, options.output_dir), end="")
    return _exit_status(report, options.output_dir)


def _pace(options: argparse.Namespace) -> Pace:
    from co_detr.tools.ablate.runner import Pace

    for flag, value in (("--jobs", options.jobs), ("--threads-per-job", options.threads_per_job)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} {value} must be at least 1.")
    hours = options.budget_hours
    if hours is not None and hours < 0:
        raise ConfigError(f"--budget-hours {hours} must be at least 0.")
    threads = options.threads_per_job or max(1, (os.cpu_count() or 1) // options.jobs)
    return Pace(options.jobs, threads, None if hours is None else hours * 3600)


def _grid(options: argparse.Namespace) -> Grid:
    from co_detr.tools.ablate.grid import Axes, check_seeds, combine, read_grid_file

    if options.grid is not None:
        for name in _AXES:
            if getattr(options, name) is not None:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} combines with --config-file; a --grid has its own.")
        return read_grid_file(options.grid, options.opts)
    axes = Axes(
        heads=tuple(options.heads or ()),
        positive_queries=tuple(options.positive_queries or ()),
        lambda_1=tuple(options.lambda_1 or ()),
        lambda_2=tuple(options.lambda_2 or ()),
    )
    seeds = [0] if options.seeds is None else options.seeds
    check_seeds(seeds, "--seeds")
    return combine(options.config_file, axes, seeds, options.opts)


def _table(specs: Sequence[RunSpec], output_dir: Path) -> str:
    from co_detr.tools.ablate.run import RunState
    from co_detr.tools.ablate.table import write_results

    return write_results([RunState.read(spec) for spec in specs], output_dir)


def _exit_status(report: Report, output_dir: Path) -> int:
    from co_detr.tools.ablate.table import TABLE_FILE

    for state in report.failed:
        print(f"error: {state.spec.title}: {state.record.problem}", file=sys.stderr)
    if report.left:
        print(
            f"{report.left} runs are not finished; the same command continues them.",
            file=sys.stderr,
        )
    print(f"Wrote {output_dir / TABLE_FILE}, table.csv, runs.csv and results.json.")
    if report.signal_number is not None:
        return 128 + report.signal_number
    return 1 if report.failed else 0
