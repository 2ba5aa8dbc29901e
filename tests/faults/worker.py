"""Runs of suites that need a process of their own, and their answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_module(module: str, *arguments: object, timeout: float) -> dict[str, Any]:
    """Run `python -m module` and return the JSON object it printed last.

    What it started dies with it (`loop_volume.enter_private_namespace`).
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    print("again by:", "python", *command[1:])  # noqa: T201 - shown by pytest on failure
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found
