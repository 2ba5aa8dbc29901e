"""Pure building of conditions: what is found now, merged with what was said before."""

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from blobcache_api.v1alpha1.common import Condition, ConditionStatus

MESSAGE_LENGTH_MAX = 1024


@dataclass(frozen=True)
class Finding:
    """A condition without its times: type, verdict, reason and what to do."""

    type: str
    status: ConditionStatus
    reason: str
    message: str


def true(kind: str, reason: str, message: str) -> Finding:
    """Return a finding that holds."""
    return Finding(kind, ConditionStatus.TRUE, reason, message)


def false(kind: str, reason: str, message: str) -> Finding:
    """Return a finding that does not hold."""
    return Finding(kind, ConditionStatus.FALSE, reason, message)


def unknown(kind: str, reason: str, message: str) -> Finding:
    """Return a finding that cannot be told yet."""
    return Finding(kind, ConditionStatus.UNKNOWN, reason, message)


def merge_conditions(
    previous: Sequence[Condition],
    findings: Iterable[Finding],
    *,
    generation: int | None,
    now: datetime.datetime,
) -> tuple[Condition, ...]:
    """
    Return the complete list to write.

    A condition's transition time moves only when its status does. Conditions this version does
    not know are dropped: nobody would ever update them again.
    """
    known: Mapping[str, Condition] = {condition.type: condition for condition in previous}
    merged = []
    for finding in findings:
        before = known.get(finding.type)
        is_same = before is not None and before.status is finding.status
        merged.append(
            Condition(
                type=finding.type,
                status=finding.status,
                observed_generation=generation,
                last_transition_time=before.last_transition_time if before and is_same else now,
                reason=finding.reason,
                message=finding.message[:MESSAGE_LENGTH_MAX],
            )
        )
    return tuple(merged)


def find_condition(conditions: Iterable[Condition], kind: str) -> Condition | None:
    """Return the condition of a type, None if there is none."""
    return next((condition for condition in conditions if condition.type == kind), None)
