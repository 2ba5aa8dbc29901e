"""Kubernetes quantities that are whole numbers of bytes."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from blobcache_api.rules import VALIDATIONS, Rule

QUANTITY_BYTES_MAX = 2**53
"""8Pi: JSON readers with double precision still tell whole numbers apart."""

QUANTITY_LENGTH_MAX = 32
"""Characters of a quantity written as a string."""

QUANTITY_MESSAGE = "must be a quantity of whole bytes from 0 to 8Pi, such as 1048576, 1Mi or 1.5Gi"

_QUANTITY = re.compile(
    r"\+?(?P<number>[0-9]+(\.[0-9]*)?|\.[0-9]+)"
    r"(?P<suffix>Ki|Mi|Gi|Ti|Pi|m|k|M|G|T|P|[eE][+-]?[0-9]{1,2})?",
    re.ASCII,
)
_SCALES = {
    "": Fraction(1),
    "m": Fraction(1, 1000),
    **{name: Fraction(1000**power) for power, name in enumerate("kMGTP", start=1)},
    **{f"{name}i": Fraction(1024**power) for power, name in enumerate("KMGTP", start=1)},
}

# One expression yields the number of bytes whichever way it is written. Doubles are exact up to
# 2**53, and `isInteger()` is false for '1.5Gi', which is whole: so wholeness is told by doubles.
_CEL_SYNTAX = (
    r"^[+]?([0-9]+([.][0-9]*)?|[.][0-9]+)(Ki|Mi|Gi|Ti|Pi|m|k|M|G|T|P|[eE][+-]?[0-9]{1,2})?$"
)
_CEL_QUANTITY = (
    "type(self) == int ? self >= 0 && self <= 9007199254740992 : "
    f"type(self) == string && self.size() <= {QUANTITY_LENGTH_MAX} && "
    f"self.matches('{_CEL_SYNTAX}') && isQuantity(self) && "
    "quantity(self).compareTo(quantity('8Pi')) <= 0 && "
    "double(int(quantity(self).asApproximateFloat())) == quantity(self).asApproximateFloat()"
)


def parse_quantity(value: Any) -> int:
    """
    Return the bytes a quantity means.

    Args:
        value: An integer, or a string as Kubernetes writes quantities: a decimal number with one of
            Ki Mi Gi Ti Pi, k M G T P, m, or an exponent (`e3`, `E3`).

    Raises:
        ValueError: It is none, negative, not whole, or more than `QUANTITY_BYTES_MAX`.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        exact = Fraction(value)
    elif isinstance(value, str) and len(value) <= QUANTITY_LENGTH_MAX:
        exact = _parse_text(value)
    else:
        raise ValueError(QUANTITY_MESSAGE)
    if exact.denominator != 1 or not 0 <= exact <= QUANTITY_BYTES_MAX:
        raise ValueError(QUANTITY_MESSAGE)
    return int(exact)


def format_quantity(size_bytes: int) -> str:
    """Return bytes for people to read, rounded down to three or more digits, such as '49.8Gi'."""
    for power, name in reversed(list(enumerate(("Ki", "Mi", "Gi", "Ti", "Pi"), start=1))):
        unit = 1024**power
        if size_bytes >= unit:
            whole, tenth = size_bytes // unit, size_bytes * 10 // unit % 10
            return f"{whole}{name}" if whole >= 100 or tenth == 0 else f"{whole}.{tenth}{name}"
    return str(size_bytes)


def _parse_text(value: str) -> Fraction:
    found = _QUANTITY.fullmatch(value)
    if found is None:
        raise ValueError(QUANTITY_MESSAGE)
    suffix = found["suffix"] or ""
    exponent = int(suffix[1:]) if suffix[:1] in ("e", "E") else None
    scale = _SCALES[suffix] if exponent is None else Fraction(10) ** exponent
    # A trailing dot ('1.Gi') is Kubernetes syntax that Fraction does not read.
    return Fraction(found["number"].removesuffix(".")) * scale


Quantity = Annotated[
    int,
    BeforeValidator(parse_quantity),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "maxLength": QUANTITY_LENGTH_MAX,
            VALIDATIONS: [{"rule": _CEL_QUANTITY, "message": QUANTITY_MESSAGE}],
        }
    ),
]
"""Whole bytes; written as a quantity, held and sent as an integer."""

CEL_BYTES = (
    "(type(self) == int ? double(self) : "
    "isQuantity(self) ? quantity(self).asApproximateFloat() : -1.0)"
)
"""Expression for the bytes of a quantity, a double; -1 for what another rule refuses anyway."""

RATE_BYTES_MIN = 1024

Rate = Annotated[
    Quantity,
    Rule(
        cel=f"{CEL_BYTES} >= {RATE_BYTES_MIN}.0",
        message="must be at least 1Ki; leave it out for no limit",
        holds=lambda size: bool(size >= RATE_BYTES_MIN),
    ),
]
"""Bytes per second; absent means no limit."""
