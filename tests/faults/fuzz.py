"""Parsers under mutated input: `python -m tests.faults.fuzz PARSER [--seconds 60]`.

Inputs are valid ones of which parts are cut, doubled, swapped, flipped or replaced by the words of
that grammar, by hypothesis; `--engine atheris` guides them by coverage instead, where somebody has
installed it (`pip install atheris`; it is not among this project's dependencies).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import sys
import time
from collections import Counter

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.faults.fuzz_targets import Target, targets
from tests.faults.loop_volume import die_with_parent

INPUT_BYTES_MAX = 64 * 1024
EXAMPLE_CPU_SECONDS_MAX = 2.0
"""For an input of that length: one that grows faster than linearly takes minutes."""
ROUND_EXAMPLES = 200
EDITS_MAX = 6
REPEATS = (1, 2, 50, 2000)
_VALUE = re.compile(rb'"[^"]*"|[0-9]+')


@st.composite
def mutants(draw: st.DrawFn, target: Target) -> bytes:
    """A valid input with up to six edits."""
    data = draw(st.sampled_from(target.seeds))
    for _ in range(draw(st.integers(0, EDITS_MAX))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from((0, 0, 1, 2, 8, 64, 4096))))
        what = draw(st.sampled_from(("word", "cut", "double", "flip", "bytes", "splice", "value")))
        part = data[start:end]
        if what == "word":
            part = draw(st.sampled_from(target.words)) * draw(st.sampled_from(REPEATS))
        elif what == "cut":
            part = b""
        elif what == "double":
            part = part * draw(st.sampled_from(REPEATS))
        elif what == "flip" and part:
            part = bytes((part[0] ^ (1 << draw(st.integers(0, 7))),)) + part[1:]
        elif what == "bytes":
            part = draw(st.binary(max_size=16))
        elif what == "value" and (values := list(_VALUE.finditer(data))):
            start, end = draw(st.sampled_from(values)).span()
            part = draw(st.sampled_from(target.words))
        elif what == "splice":
            other = draw(st.sampled_from(target.seeds))
            part = other[draw(st.integers(0, len(other))) :]
        data = (data[:start] + part + data[end:])[:INPUT_BYTES_MAX]
    return data


class Watch:
    """Runs a target and counts."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.tally: Counter[str] = Counter()
        self.slowest = 0.0

    def __call__(self, data: bytes) -> None:
        """Run it on one input.

        Raises:
            AssertionError: What came out is wrong, or took too long.
        """
        begun = time.process_time()
        try:
            self._target.run(data)
            self.tally["accepted"] += 1
        except self._target.refusals:
            self.tally["refused"] += 1
        spent = time.process_time() - begun
        self.slowest = max(self.slowest, spent)
        self.tally["examples"] += 1
        self.tally["bytes"] += len(data)
        assert spent < EXAMPLE_CPU_SECONDS_MAX, f"{len(data)} bytes took {spent:.1f} s"


def run(name: str, seconds: float, seed: int) -> dict[str, object]:
    """Fuzz one parser for so long by hypothesis and return what was seen."""
    target = targets()[name]
    watch = Watch(target)
    for data in target.seeds:
        watch(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        test = settings(
            max_examples=ROUND_EXAMPLES,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )(given(mutants(target))(watch.__call__))
        hypothesis.seed(seed)(test)()
        seed += 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {**watch.tally, "slowest": round(watch.slowest, 3), "grown_mib": grown // 1024}


def run_atheris(name: str, seconds: float, seed: int) -> None:
    """Fuzz one parser by coverage; a finding ends the process with its input on disk."""
    import atheris  # type: ignore[import-not-found]

    with atheris.instrument_imports(include=["blobcache_agent", "blobcache_storage"]):
        target = targets()[name]
    watch = Watch(target)
    rng = random.Random(seed)

    def mutate(data: bytes, max_size: int, mutation_seed: int) -> bytes:
        if not data or rng.random() < 0.05:
            return bytes(rng.choice(target.seeds)[:max_size])
        if rng.random() < 0.3:
            at = rng.randrange(len(data) + 1)
            return bytes((data[:at] + rng.choice(target.words) + data[at:])[:max_size])
        return bytes(atheris.Mutate(data, max_size))

    arguments = [
        sys.argv[0], f"-max_total_time={seconds:.0f}", f"-max_len={INPUT_BYTES_MAX}",
        "-rss_limit_mb=512", f"-seed={seed}", "-verbosity=0", "-print_final_stats=1",
    ]  # fmt: skip
    atheris.Setup(arguments, watch, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> None:
    """Run what the command line says and print what was seen as JSON."""
    parser = argparse.ArgumentParser(description="Fuzzes one parser.")
    parser.add_argument("parser", choices=sorted(targets()))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=("hypothesis", "atheris"), default="hypothesis")
    arguments = parser.parse_args()
    die_with_parent()
    if arguments.engine == "atheris":
        run_atheris(arguments.parser, arguments.seconds, arguments.seed)
        return
    found = run(arguments.parser, arguments.seconds, arguments.seed)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
