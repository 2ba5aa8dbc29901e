"""Power cuts: what was recorded is there, what is there is right, and each defence is needed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults import scale
from tests.faults.loop_volume import Unavailable, check_available
from tests.faults.worker import run_module

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900 * max(1, scale.cuts() // 2000))]

KINDS = ["ext4", "xfs"]
MUTANT_CUTS = 50
HITS_PERCENT_MIN = 95
MUTANT_TRIES = 4
SECONDS_PER_CUT_MAX = 0.5


def cut(kind: str, cuts: int, *mutants: str, seed: int | None = None) -> dict[str, Any]:
    """Run cuts and return their tally; void where too little happened."""
    try:
        check_available(kind)
    except Unavailable as error:
        pytest.skip(f"no power can be cut: {error}")
    arguments = ["--kind", kind, "--cuts", cuts, "--seed", scale.seed() if seed is None else seed]
    for mutant in mutants:
        arguments += ["--mutant", mutant]
    timeout = 60 + SECONDS_PER_CUT_MAX * cuts
    tally = run_module("tests.faults.power_cut", *arguments, timeout=timeout)
    print({name: value for name, value in tally.items() if not isinstance(value, list)})  # noqa: T201
    by_call = tally["cuts_by_call"]
    mid_write = tally["cuts"] - by_call.get("idle", 0)
    assert tally["cuts"] == cuts, "void: too few cuts"
    assert mid_write >= cuts * 0.6, f"void: only {mid_write} cuts in the middle of work"
    assert by_call.get("sync_data data", 0) >= cuts * 0.1, "void: too few cuts before a sync"
    assert tally["fills"] >= 3 * cuts, "void: too few fills"
    assert tally["evictions"] >= cuts / 2, "void: too few evictions"
    assert sum(tally["forced"].values()) >= 2 * cuts, "void: too little was written back"
    assert tally["bytes_checked"] >= cuts * 200_000, "void: too few bytes were checked"
    return tally


@pytest.mark.parametrize("kind", KINDS)
def test_no_cut_makes_a_wrong_byte(kind: str) -> None:
    """Nor a failure once the power is back; and what is on the medium is found again."""
    tally = cut(kind, scale.cuts() // len(KINDS))
    assert not tally["wrong"]
    assert not tally["failed_before_cut"], "a read failed though disk and origin were well"
    assert tally["mismatches"] == 0, "a chunk was recorded that was not on the medium"
    assert tally["recorded"] >= 5 * tally["cuts"], "void: too few chunks were recorded"
    assert tally["durable_hits"] == tally["durable"], "what was synced, map and all, was lost"
    assert tally["recorded_hits"] * 100 >= tally["recorded"] * HITS_PERCENT_MIN
    assert not tally["failed_after_cut"], "a reader noticed that the disk was gone"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mutant", ["record-before-sync", "sync-dropped"])
def test_wrong_order_without_verification_is_caught(kind: str, mutant: str) -> None:
    """The suite sees what it is for: each of these mutants serves wrong bytes."""
    for number in range(MUTANT_TRIES):
        seed = scale.seed() + 1000 * number
        if cut(kind, MUTANT_CUTS, mutant, "verification-off", seed=seed)["wrong"]:
            return
    pytest.fail(f"{mutant} went unnoticed in {MUTANT_TRIES} runs of {MUTANT_CUTS} cuts")


@pytest.mark.parametrize("kind", KINDS)
def test_right_order_suffices_without_verification(kind: str) -> None:
    """The order of writing alone keeps wrong bytes out."""
    assert not cut(kind, MUTANT_CUTS, "verification-off")["wrong"]


@pytest.mark.parametrize("kind", KINDS)
def test_checksums_suffice_without_syncs(kind: str) -> None:
    """Verification alone keeps wrong bytes out, and had something to find."""
    tally = cut(kind, MUTANT_CUTS, "sync-dropped")
    assert not tally["wrong"]
    assert tally["mismatches"] > 0, "void: no recorded chunk was lost"
