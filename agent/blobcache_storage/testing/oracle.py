"""The byte oracle: every byte of every version of every blob, known without being stored.

`byte(seed, blob, version, offset)` is the AES-128-CTR key stream under a key derived from seed,
blob and version. Any range costs time in proportion to its length only, some GiB/s, so a test can
check what it was served without keeping a copy, and two versions of a blob agree nowhere for long.
"""

from __future__ import annotations

import functools
import hashlib

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_CIPHER_BLOCK_BYTES = 16
_DIGEST_STEP_BYTES = 1024 * 1024


@functools.lru_cache(maxsize=4096)
def _key(seed: int, blob_id: str, version: int) -> bytes:
    """Return the AES key of one version; fields are framed, so none can mimic another."""
    name = blob_id.encode("utf-8", "surrogatepass")
    material = b"%d,%d,%d:%s" % (seed, version, len(name), name)
    return hashlib.sha256(material).digest()[:16]


class ByteOracle:
    """What the bytes are.

    Args:
        seed: Two oracles of different seeds share no blob.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def read(self, blob_id: str, version: int, start: int, end: int) -> bytes:
        """Return the bytes `[start, end)` of a version; the blob has no end here."""
        if end <= start:
            return b""
        first_block, skip = divmod(start, _CIPHER_BLOCK_BYTES)
        counter = first_block.to_bytes(_CIPHER_BLOCK_BYTES, "big")
        cipher = Cipher(algorithms.AES(_key(self.seed, blob_id, version)), modes.CTR(counter))
        stream = cipher.encryptor().update(bytes(skip + end - start))
        return stream[skip:] if skip else stream

    def blob(self, blob_id: str, version: int, size_bytes: int) -> bytes:
        """Return a whole blob."""
        return self.read(blob_id, version, 0, size_bytes)

    def etag(self, blob_id: str, version: int) -> str:
        """Return a strong entity tag of a version, with its quotes."""
        return f'"{_key(self.seed, blob_id, version).hex()}"'

    def digest(self, blob_id: str, version: int, size_bytes: int) -> str:
        """Return `sha256:<hex>` of a blob, without holding it."""
        digest = hashlib.sha256()
        for start in range(0, size_bytes, _DIGEST_STEP_BYTES):
            end = min(start + _DIGEST_STEP_BYTES, size_bytes)
            digest.update(self.read(blob_id, version, start, end))
        return f"sha256:{digest.hexdigest()}"

    def first_wrong(self, blob_id: str, version: int, offset: int, data: bytes) -> int | None:
        """Return the blob offset of the first byte of `data` that is not the oracle's.

        Args:
            offset: Where in the blob `data` is said to begin.

        Returns:
            None if all bytes are right.
        """
        right = self.read(blob_id, version, offset, offset + len(data))
        if right == data:
            return None
        return offset + next(i for i, (a, b) in enumerate(zip(right, data, strict=True)) if a != b)
