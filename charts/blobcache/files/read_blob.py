"""Read the self-test's blob through the Service as any pod would, and check its digest.

Arguments: the blob's URL, its sha256, the file of the projected token, seconds to try. Until the
configuration has reached the agents they answer 404 or 503, which is not yet a failure.
"""

import hashlib
import pathlib
import sys
import time
import urllib.error
import urllib.request

ATTEMPT_SECONDS = 10
PAUSE_SECONDS = 1


def read(url: str, token: str | None) -> tuple[int, str, bytes]:
    """Return status, Cache-Status and body; status 0 when there was no answer."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        request = urllib.request.Request(url, headers=headers)  # noqa: S310 - the chart's own URL
        with opener.open(request, timeout=ATTEMPT_SECONDS) as answer:
            return answer.status, answer.headers.get("Cache-Status", ""), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, "", error.read(4096)
    except OSError as error:
        return 0, "", str(error).encode()


def tell(line: str) -> None:
    """Say what was found."""
    sys.stdout.write(f"{line}\n")


def main(url: str, digest: str, token_file: str, seconds: str) -> str:
    """Return what failed, or nothing."""
    token = pathlib.Path(token_file).read_text().strip()
    deadline = time.monotonic() + float(seconds)
    while True:
        status, cache_status, body = read(url, token)
        if status == 200:
            break
        if time.monotonic() > deadline:
            text = body.decode(errors="replace")
            return f"{url} was not served within {seconds} s: {status or 'no answer'} {text}"
        time.sleep(PAUSE_SECONDS)
    tell(f"read {len(body)} bytes; Cache-Status: {cache_status}")
    found = hashlib.sha256(body).hexdigest()
    if found != digest:
        return f"the digest is {found}, not {digest}"
    tell(f"sha256 {found} is right")
    status, cache_status, body = read(url, token)
    if status != 200 or hashlib.sha256(body).hexdigest() != digest:
        return f"the second read answered {status}, not the same bytes"
    tell(f"read again; Cache-Status: {cache_status}")
    status, _, _ = read(url, None)
    if status != 401:
        return f"a reader without a token was answered {status}, not 401"
    tell("a reader without a token is refused")
    return ""


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) or None)
