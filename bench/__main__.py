"""The command: which measurements, how many rounds, and where the results go."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import cold, crowd, hits, many, report
from bench.machine import Others, describe, load_average
from bench.picture import svg
from bench.process import BenchError, temporary_folder
from bench.ratios import Row
from bench.servers import Bench

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "performance.md"
PICTURE = HERE / "results.svg"
RESULTS = HERE / "results.json"

Measure = Callable[[Bench], list[Row]]

MEASUREMENTS: dict[str, tuple[str, Measure]] = {
    "hits": ("hits of 4 KiB to 16 MiB, speed, CPU and memory, against nginx", hits.measure),
    "cold": ("1 GiB that is not cached, against reading the origin", cold.measure),
    "first-byte": ("first byte of a miss over a 20 ms origin", cold.measure_first_byte),
    "sparse": ("sparse reads: the origin's bytes for each byte asked", cold.measure_sparse),
    "herd": ("100 and 1,000 readers of one cold blob", crowd.measure_herd),
    "slow-readers": ("p99 of healthy readers beside 500 slow ones", crowd.measure_slow_readers),
    "many": ("start and memory with 10,000 blobs", many.measure),
}

_EPILOG = """\
measurements:
{names}
Needs nginx and wrk (Debian: apt install nginx-light wrk; varnish is measured too where it is
installed); installs nothing itself. All servers listen on loopback, all files are in one folder
below --folder, and both are gone afterwards, also after Ctrl-C.

Each figure is a ratio: servers take turns, each round gives one ratio, and the median is shown
with the lowest and the highest round. Absolute numbers stand beside it to be doubted. On a busy
machine use more rounds, and believe the ratio of CPU seconds before that of requests.

  make bench                                  all of it, some seven minutes
  make bench ARGS='--only hits --rounds 9'    one thing, more carefully
  make bench ARGS=--docs                      all of it, into docs/performance.md
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 if a measurement could not be taken."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(given)
    if options.docs and options.only:
        parser.error("--docs replaces the whole table, so it takes all measurements: no --only")
    signal.signal(signal.SIGTERM, _interrupt)
    machine = describe(given)
    rows: list[Row] = []
    failed: dict[str, str] = {}
    others, load_before = Others(), load_average()
    try:
        with temporary_folder(options.folder) as folder:
            bench = Bench(folder, options.rounds, options.seconds)
            _measure(bench, options.only or list(MEASUREMENTS), rows, failed)
    except KeyboardInterrupt:
        print("Interrupted; everything that was started has ended.", file=sys.stderr)
        return 130
    machine["load"] = (
        f"{load_before:.1f} before; others took {others.percent():.0f} % of both cores meanwhile"
    )
    print("\n" + report.plain(rows))
    _write(options, rows, machine, failed)
    for name, problem in failed.items():
        print(f"\n{name} could not be measured: {problem}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    names = "".join(f"  {name:14}{what}\n" for name, (what, _) in MEASUREMENTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure Blobcache against its peers on this machine.",
        epilog=_EPILOG.format(names=names),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", action="append", choices=MEASUREMENTS, metavar="NAME", help="several times")
    add("--rounds", type=_at_least_one, default=5, metavar="N", help="default 5")
    add("--seconds", type=_at_least_one, default=2, metavar="S", help="of each load; default 2")
    add("--json", type=Path, metavar="FILE", help="write all results there")
    add("--svg", type=Path, metavar="FILE", help="write the picture there")
    add("--docs", action="store_true", help="write the table of docs/performance.md, and both")
    add(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        metavar="DIR",
        help="a local disk with 8 GiB free; default: the system's folder for temporary files",
    )
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _measure(bench: Bench, names: Sequence[str], rows: list[Row], failed: dict[str, str]) -> None:
    """Take each measurement; what cannot be taken costs only itself."""
    bench.make_data()
    for name in names:
        what, measure = MEASUREMENTS[name]
        print(f"{name}: {what} …", file=sys.stderr, flush=True)
        begun = time.monotonic()
        try:
            found = measure(bench)
        except (BenchError, OSError) as problem:
            failed[name] = str(problem)
            continue
        rows += found
        print(report.plain(found), f"({time.monotonic() - begun:.0f} s)", file=sys.stderr)


def _write(
    options: argparse.Namespace,
    rows: Sequence[Row],
    machine: dict[str, str],
    failed: dict[str, str],
) -> None:
    results = options.json or (RESULTS if options.docs else None)
    picture = options.svg or (PICTURE if options.docs else None)
    if results:
        results.write_text(report.to_json(rows, machine, failed))
    if picture:
        picture.write_text(svg(rows, f"Blobcache against its goals, {machine['date']}"))
    if options.docs:
        section = f"{report.markdown(rows)}\n{report.facts(machine)}"
        DOCUMENT.write_text(report.put_between(DOCUMENT.read_text(), section))


if __name__ == "__main__":
    sys.exit(main())
