"""Run the demo: `make demo`. Ends with the line `demo: ok`, or says what was not so."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tests.demo.narration import DemoFailedError, Narrator
from tests.demo.scenes import Play
from tests.demo.stage import Stage
from tests.harness.binaries import locate, preflight

_PROGRAMS = ("etcd", "kube-apiserver", "kubectl", "registry")
_DISK_BYTES_NEEDED = 6 * 1024**3
_LOG_TAIL_LINES = 20


def main() -> int:
    """Check the machine, play all scenes, clean up; return the exit code."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="keep the folder with all logs")
    arguments = parser.parse_args()
    # SIGINT too: a shell starts what it puts in the background with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    narrator = Narrator()
    if not _is_machine_fit(narrator):
        return 1
    for program in _PROGRAMS:
        locate(program)
    folder = Path(tempfile.mkdtemp(prefix="blobcache-demo-"))
    is_kept = arguments.keep
    try:
        with Stage(folder) as stage:
            Play(stage, narrator).run()
    except KeyboardInterrupt:
        narrator.say("\ndemo: interrupted; everything it started has been stopped")
        return 130
    except Exception as error:
        is_kept = True
        _explain(narrator, folder, error)
        return 1
    finally:
        if not is_kept:
            shutil.rmtree(folder, ignore_errors=True)
    narrator.say(f"\ntook {narrator.elapsed_seconds:.0f} s\ndemo: ok")
    return 0


def _is_machine_fit(narrator: Narrator) -> bool:
    missing = preflight(_PROGRAMS)
    for thing in missing:
        narrator.say(f"missing: {thing.thing}\n    {thing.remedy}")
    free_bytes = shutil.disk_usage(tempfile.gettempdir()).free
    if free_bytes < _DISK_BYTES_NEEDED:
        narrator.say(
            f"missing: disk space in {tempfile.gettempdir()}: {free_bytes / 1024**3:.1f} GiB are "
            f"free, {_DISK_BYTES_NEEDED / 1024**3:.0f} GiB are needed\n    set TMPDIR to another"
        )
        return False
    return not missing


def _explain(narrator: Narrator, folder: Path, error: Exception) -> None:
    """Print what failed, with the ends of the logs of what we wrote."""
    for log in sorted(folder.rglob("agent.log")) + sorted(folder.glob("operator*.log")):
        narrator.say(f"\n--- the end of {log}")
        narrator.show("\n".join(log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]))
    if not isinstance(error, DemoFailedError | TimeoutError):
        narrator.say(f"\n{type(error).__name__}")
    narrator.say(f"\ndemo: failed: {error}\nall logs are in {folder}")


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
