"""Records as tables for people and as values for JSON."""

from __future__ import annotations

from dataclasses import asdict

from benchmarks.common import markdown_table, ratio
from benchmarks.step.case import Case
from benchmarks.step.contestants import Contestant
from benchmarks.step.processes import Record

MIB = 2**20


def measurements_table(records: list[Record], case: Case) -> str:
    """One row per contestant and allocator; times are medians and quartiles in seconds."""
    parts = ["forward", "backward", *(["optimizer"] if case.with_optimizer else [])]
    headers = ["contestant", "allocator", "step (quartiles)"]
    headers += parts if case.mode == "train" else []
    headers += ["peak MiB", "above the model", "CPU s", "in kernel", "page faults"]
    rows = []
    for record in records:
        timing = record.timing()
        low, high = timing.quartiles
        row = [*record.key, f"{timing.median:.3f} ({low:.3f}-{high:.3f})"]
        if case.mode == "train":
            row += [f"{record.timing(part).median:.3f}" for part in parts]
        row += [f"{record.peak / MIB:.0f}", f"{record.growth / MIB:.0f}"]
        row += [f"{record.median('cpu_seconds'):.2f}", f"{record.median('kernel_seconds'):.2f}"]
        rows.append([*row, f"{record.median('page_faults'):.0f}"])
    return markdown_table(headers, rows)


def ratios_table(records: list[Record]) -> str:
    """How the contestants compare; empty when there is nothing to compare.

    Times and processor's times: medians over rounds of the ratio within a round. Least times: of
    the fastest steps. The processor's time says most where others use the machine.
    """
    by_key = {record.key: record for record in records}
    rows = []
    for other, base in _pairs(by_key):
        mine, theirs = by_key[base], by_key[other]
        rows.append(
            [
                "{} ({}) / {} ({})".format(*other, *base),
                f"{ratio(theirs.timing(), mine.timing()):.3f}",
                f"{min(theirs.timing().calls) / min(mine.timing().calls):.3f}",
                f"{ratio(theirs.timing('cpu_seconds'), mine.timing('cpu_seconds')):.3f}",
                f"{theirs.peak / mine.peak:.2f}",
                f"{theirs.growth / mine.growth:.2f}" if mine.growth > 0 else "-",
            ]
        )
    headers = ["ratio", "time", "least time", "CPU time", "peak", "above the model"]
    return markdown_table(headers, rows) if rows else ""


def _pairs(records: dict[tuple[str, str], Record]) -> list[tuple[tuple, tuple]]:
    """(numerator, denominator): all others to k0, variants and peers to k2, out of the box last."""
    pairs = []
    names = list(dict.fromkeys(name for name, _ in records))
    peers = [key[0] for key, record in records.items() if record.setup.contestant.kind != "co_detr"]
    peers = list(dict.fromkeys(peers))
    own = [name for name in names if name not in peers]
    for allocator in dict.fromkeys(allocator for _, allocator in records):
        pairs += [((name, allocator), ("k0", allocator)) for name in own if name != "k0"]
        pairs += [((name, allocator), ("k2", allocator)) for name in own if name[:3] == "k2-"]
        pairs += [((peer, allocator), (name, allocator)) for peer in peers for name in own[:3]]
        for name in own:
            original, separator, _ = name.partition("@")
            if separator:
                pairs.append(((name, allocator), (original, allocator)))
    pairs += [((name, "default"), (name, "tuned")) for name in names]
    # As each comes out of the box: this project tunes the allocator itself, peers do not.
    pairs += [((peer, "default"), (name, "tuned")) for peer in peers for name in own[:3]]
    return [pair for pair in dict.fromkeys(pairs) if set(pair) <= records.keys()]


def as_json(case: Case, records: list[Record], failures: dict[str, str]) -> dict:
    """Everything that was measured in ``case``."""
    return {
        "case": asdict(case),
        "failures": failures,
        "contestants": [
            {
                "contestant": _describe(record.setup.contestant),
                "allocator": record.setup.allocator,
                "parameters": record.parameters,
                "memory": {
                    "after_import": record.after_import,
                    "after_build": record.after_build,
                    "peak": record.peak,
                },
                "step": record.timing().as_dict(),
                "forward": record.timing("forward").as_dict(),
                "backward": record.timing("backward").as_dict(),
                "optimizer": record.timing("optimizer").as_dict(),
                "turns": [[asdict(step) for step in turn] for turn in record.turns],
            }
            for record in records
        ],
    }


def _describe(contestant: Contestant) -> dict:
    """All but where its checkout lies, which means nothing on another machine."""
    return {key: value for key, value in asdict(contestant).items() if key != "root"}
