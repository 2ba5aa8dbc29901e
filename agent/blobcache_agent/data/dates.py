"""HTTP dates (RFC 9110 section 5.6.7): read strictly in the three forms, written in the first."""

from __future__ import annotations

import calendar
import re
import time
from datetime import UTC, datetime

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_DAY = "(?:" + "|".join(_DAYS) + ")"
_LONG_DAY = "(?:Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday)"
_MONTH = "(?P<month>" + "|".join(_MONTHS) + ")"
_TIME = r"(?P<hour>[0-9]{2}):(?P<minute>[0-9]{2}):(?P<second>[0-9]{2})"
_FORMS = (
    re.compile(rf"{_DAY}, (?P<day>[0-9]{{2}}) {_MONTH} (?P<year>[0-9]{{4}}) {_TIME} GMT"),
    re.compile(rf"{_LONG_DAY}, (?P<day>[0-9]{{2}})-{_MONTH}-(?P<year>[0-9]{{2}}) {_TIME} GMT"),
    re.compile(rf"{_DAY} {_MONTH} (?P<day>[0-9 ][0-9]) {_TIME} (?P<year>[0-9]{{4}})"),
)
_LEAP_SECOND = 60
_CENTURY = 100
_FUTURE_YEARS_MAX = 50


def parse_http_date(value: str) -> int | None:
    """Return unix seconds, or None for what is not an HTTP date (it is then to be ignored)."""
    for form in _FORMS:
        match = form.fullmatch(value)
        if match is not None:
            break
    else:
        return None
    second = int(match["second"])
    if second > _LEAP_SECOND:
        return None
    try:
        moment = datetime(
            _full_year(match["year"]),
            _MONTHS.index(match["month"]) + 1,
            int(match["day"]),
            int(match["hour"]),
            int(match["minute"]),
            tzinfo=UTC,
        )
    except ValueError:
        return None
    return calendar.timegm(moment.timetuple()) + second


def _full_year(digits: str) -> int:
    """A two-digit year more than 50 years ahead is a past one (RFC 9110 section 5.6.7)."""
    year = int(digits)
    if len(digits) > 2:
        return year
    this_year = datetime.now(UTC).year
    year += this_year - this_year % _CENTURY
    return year - _CENTURY if year > this_year + _FUTURE_YEARS_MAX else year


def format_http_date(unix_seconds: int) -> str:
    """Return the fixed-length form, independent of the locale."""
    moment = time.gmtime(unix_seconds)
    return (
        f"{_DAYS[moment.tm_wday]}, {moment.tm_mday:02d} {_MONTHS[moment.tm_mon - 1]} "
        f"{moment.tm_year:04d} {moment.tm_hour:02d}:{moment.tm_min:02d}:{moment.tm_sec:02d} GMT"
    )


class DateClock:
    """The Date header, formatted once a second."""

    def __init__(self) -> None:
        self._second = -1
        self._text = ""

    def now(self) -> str:
        """Return the present HTTP date."""
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._text = format_http_date(second)
        return self._text
