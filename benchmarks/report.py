"""Turn pytest-benchmark's JSON into a table, a plot and the README's section.

python benchmarks/report.py JSON [JSON ...] --out DIR [--readme README.md]

DIR gets report.md with all that was measured, the plots, and the figures they were made from. The
README gets the first cases, those of the short grid, and every one in which fastflow is slower.

Every figure is a speed-up: the rival's time over that of fastflow's fastest backend, the median of
interleaved rounds. Cases in which fastflow is slower stay in, marked. Seconds are shown for GPUs
only: those of a CPU say more about the machine than about the code.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from legends import SHOWN
from plots import plot
from runs import (
    DIRECTIONS,
    FLOORS,
    RIVALS,
    SWEEP_OPS,
    ReportError,
    Row,
    Run,
    load,
    save,
)
from tabulate import tabulate

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
SLOWER = "▼"
ONCE = "†"
LEGEND = (
    "Speed-up: the other's time over that of fastflow's fastest backend, the median of rounds in "
    f"which they take turns. Below 1 fastflow is slower: **bold**, {SLOWER}. "
    f"{ONCE}: so slow that it was timed once. Forward: without gradients."
)
COPY_LEGEND = (
    "Of copy: the bytes that must be moved at least, per second, in proportion to a plain copy in "
    "the same run; for cases larger than the caches."
)


def figure(value: float) -> str:
    """At most three digits that count: 1230, 45.6, 7.89, 0.79, 0.0068."""
    if value < 0.1:
        return f"{value:.2g}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def speedup(entry: dict, rival: str, once: bool = False) -> str:
    """A cell of the table."""
    if rival not in entry["speedup_over"]:
        return "–"
    value = entry["speedup_over"][rival]["median"]
    mark = f" {ONCE}" if once else ""
    if value >= 1 or rival in FLOORS:
        return f"{figure(value)}x{mark}"
    return f"**{figure(value)}x** {SLOWER}{mark}"


def duration(seconds: float) -> str:
    """In microseconds or milliseconds."""
    return f"{figure(seconds * 1e6)} µs" if seconds < 1e-3 else f"{figure(seconds * 1e3)} ms"


def summary(run: Run, rows: list[Row]) -> str:
    """Rows of a run as a table: fastflow's fastest against the rest, case by case."""
    shown = [rival for rival in RIVALS if any(rival in row.contenders for row in rows)]
    copied = any(row.fastest["share_of_copy"] is not None for row in rows)
    lines = []
    for row in rows:
        best = row.fastest
        line = {
            "case": row.case,
            "direction": DIRECTIONS[row.direction],
            "backend": best["backend"],
        }
        for rival in shown:
            once = row.contenders.get(rival, {}).get("rounds") == 1
            line[RIVALS[rival]] = speedup(best, rival, once)
        if copied:
            share = best["share_of_copy"]
            line["of copy"] = "–" if share is None else f"{100 * share:.0f}%"
        if run.on_gpu:
            line["time"] = duration(best["median_seconds"])
        lines.append(line)
    return table(lines)


def details(run: Run) -> str:
    """Every contender: what the summary leaves out, and the errors that the gate measured."""
    lines = []
    for row in run.rows:
        for name, entry in row.contenders.items():
            line = {"case": row.case, "direction": DIRECTIONS[row.direction], "contender": name}
            line["over PyTorch"] = speedup(entry, "eager") if name != "eager" else "1"
            spread = entry["speedup_over"].get("eager")
            line["quartiles"] = (
                f"{figure(spread['q1'])} – {figure(spread['q3'])}" if spread else "–"
            )
            line["largest error"] = f"{max(entry['errors'].values()):.1e}"
            kept = entry.get("saved_bytes")
            line["kept for backward"] = "–" if kept is None else f"{figure(kept / 2**20)} MiB"
            if "steps_per_second" in entry:
                line["steps/s"] = figure(entry["steps_per_second"])
            if run.on_gpu:
                line["time"] = duration(entry["median_seconds"])
                line["GB/s"] = figure(entry["gbps"]) if "gbps" in entry else "–"
            lines.append(line)
    return table(lines)


def table(lines: list[dict]) -> str:
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def versions(run: Run) -> str:
    """What was measured, and whether the machine was quiet."""
    names = ("fastflow", "triton", "cuda", "python")
    names += ("zuko", "nflows", "normflows", "pyro-ppl")
    known = [f"{name} {run.facts[name]}" for name in names if run.facts.get(name)]
    line = ", ".join(known) + "."
    load, cores = run.facts["load"], run.facts["cores"]
    if load > cores / 4:
        line += f" The machine was busy when this began (load {load:.1f} on {cores} cores)."
    return line


def section(run: Run, pictures: list[Path], base: Path) -> str:
    """Heading, pictures and table of a run; pictures are linked relative to a folder."""
    tables = [summary(run, run.rows_of(op)) for op in run.ops]
    return "\n\n".join([heading(run, pictures, base), *tables, versions(run)])


def excerpt(run: Run, pictures: list[Path], page: Path, base: Path) -> str:
    """A section with the first few rows, and a line that says where all of them are."""
    tables = [
        summary(run, rows) for op in run.ops if op not in SWEEP_OPS and (rows := first(run, op))
    ]
    link = f"[{page.name}]({os.path.relpath(page, base)})"
    rest = f"All {len(run.rows)} rows, with errors and spreads, are in {link}. {slower(run)}"
    return "\n\n".join([heading(run, pictures, base), *tables, rest, versions(run)])


def first(run: Run, op: str) -> list[Row]:
    """The rows of an op for the README."""
    rows = run.rows_of(op)
    shown = SHOWN[op]
    cases = list(dict.fromkeys(row.case for row in rows))[: shown.cases]
    return [row for row in rows if row.case in cases and row.direction in shown.directions]


def heading(run: Run, pictures: list[Path], base: Path) -> str:
    links = [f"![Speed-up of fastflow]({os.path.relpath(picture, base)})" for picture in pictures]
    return "\n\n".join([f"### {run.title}", *links])


def slower(run: Run) -> str:
    """In how many comparisons of a run fastflow lost, and which."""
    over = [
        (f"{row.case} {DIRECTIONS[row.direction]} against {RIVALS[rival]}", ratio["median"])
        for row in run.rows
        for rival, ratio in row.fastest["speedup_over"].items()
        if rival not in FLOORS
    ]
    lost = [f"{what} ({figure(value)}x)" for what, value in over if value < 1]
    named = f": {', '.join(lost)}" if lost else ""
    return f"fastflow is slower in {len(lost)} of {len(over)} comparisons{named}."


def replace_between_marks(text: str, new: str) -> str:
    """The text with what stands between the two marks replaced.

    Raises:
        ReportError: a mark is missing or they are in the wrong order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ReportError(f"the README has no {BEGIN} followed by {END}")
    return f"{before}{BEGIN}\n{new.strip()}\n{END}{after}"


def write(runs: list[Run], out: Path, readme: Path | None) -> list[Path]:
    """Writes the report; returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, list[Path]] = {}
    for run in runs:
        for op in run.ops:
            picture = out / f"{op}-{run.name}.png"
            drawn = pictures.setdefault(run.name, [])
            if plot(run, op, picture):
                drawn.append(picture)
    ops = dict.fromkeys(op for run in runs for op in run.ops)
    legends = [LEGEND, *(SHOWN[op].legend for op in ops if op in SHOWN)]
    parts = ["# Benchmarks", *legends, COPY_LEGEND]
    for run in runs:
        parts += [section(run, pictures[run.name], out), "#### All contenders", details(run)]
    page = out / "report.md"
    page.write_text("\n\n".join(parts) + "\n")
    written = [page, *(picture for few in pictures.values() for picture in few)]
    for run in runs:
        numbers = out / f"{run.name}.json"
        if numbers.resolve() != run.source.resolve():  # which holds more
            save(run, numbers)
            written.append(numbers)
    if readme is not None:
        try:
            text = readme.read_text()
        except OSError as failure:
            raise ReportError(f"{readme}: {failure.strerror}") from None
        sections = [excerpt(run, pictures[run.name], page, readme.parent) for run in runs]
        readme.write_text(replace_between_marks(text, "\n\n".join([*sections, *legends])))
        written.append(readme)
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", nargs="+", type=Path, help="files of pytest --benchmark-json")
    parser.add_argument("--out", required=True, type=Path, help="folder for tables, plots, figures")
    parser.add_argument("--readme", type=Path, help="file whose benchmark section is replaced")
    options = parser.parse_args(arguments)
    try:
        runs = [load(path) for path in options.json]
        if len({run.name for run in runs}) < len(runs):
            raise ReportError("two of the JSON files have the same name: plots would overwrite")
        for path in write(runs, options.out, options.readme):
            print(path)
    except ReportError as problem:
        print(f"report: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
