"""The map file: which chunks of one version of a blob are on disk, each with its checksum.

Pure: bytes in, values out. All numbers are little-endian. What is foreign, torn, truncated or of
another version of the format reads as "nothing is here"; it is never an error.

The first 4,096 bytes are the header page::

    offset  size  field
         0     8  magic "blobcmap"
         8     4  format version, 1
        12     4  chunk size in bytes, a power of two
        16     8  generation: random, not 0; ties slots to this file
        24     8  size of the blob in bytes
        32     8  creation time, unix nanoseconds
        40    16  owner: first 16 bytes of sha256 of the configuration's uid
        56     1  validator kind (1 ETag, 2 Last-Modified, 3 digest, 4 file)
        57     1  bit 0: an entity tag follows; bit 1: a Last-Modified date follows
        58     2  length of the blob id
        60     2  length of the validator's token
        62     2  length of the entity tag
        64     2  length of the Last-Modified date
        66     …  these four strings, UTF-8, one after the other; zeros up to 3,580
     3,580     4  CRC-32C of bytes 0 to 3,579
     3,584    32  sha256 of the whole blob, once it was found to match; else zeros
     3,616     4  CRC-32C of (generation, that sha256); 0 while there is none
     3,620   476  zeros

The whole-blob record has a 512-byte sector to itself, since it is written long after the rest.
From 4,096 a slot per chunk, 8 bytes each::

         0     4  CRC-32C of the chunk's data
         4     4  CRC-32C of (generation as u64, chunk index as u64, the CRC before as u32)

A slot of zeros is an absent chunk. Each slot stands or falls alone: a torn write, a slot of
another generation or in another place has a wrong second word. docs/format.md says the same with
the reasons.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from dataclasses import dataclass

from crc32c import crc32c

from blobcache_storage.device import BlobVersion, Validator

MAGIC = b"blobcmap"
FORMAT_VERSION = 1
HEADER_SIZE_BYTES = 4096
SLOT_SIZE_BYTES = 8
WHOLE_RECORD_OFFSET = 3584
WHOLE_RECORD_SIZE_BYTES = 36
CHUNKS_MAX = 1 << 24
"""Chunks per blob, as Nydus: 1 TiB at 64 KiB."""
CHUNK_SIZE_BYTES_MIN = 4 * 1024
CHUNK_SIZE_BYTES_MAX = 16 * 1024 * 1024
BLOB_ID_BYTES_MAX = 1024
TOKEN_BYTES_MAX = 1024
LAST_MODIFIED_BYTES_MAX = 256

_FIXED = struct.Struct("<8sIIQQQ16sBBHHHH")
_CRC = struct.Struct("<I")
_WHOLE = struct.Struct("<32sI")
_SLOT_SEAL = struct.Struct("<QQI")
_WHOLE_SEAL = struct.Struct("<Q32s")
_CHECKSUM_OFFSET = WHOLE_RECORD_OFFSET - _CRC.size
_HAS_ETAG = 1
_HAS_LAST_MODIFIED = 2
_VALIDATOR_NUMBERS = {
    Validator.ETAG: 1,
    Validator.LAST_MODIFIED: 2,
    Validator.DIGEST: 3,
    Validator.FILE: 4,
}
_VALIDATORS = {number: validator for validator, number in _VALIDATOR_NUMBERS.items()}


@dataclass(frozen=True, slots=True)
class MapHeader:
    """What a map is about."""

    blob_id: str
    version: BlobVersion
    chunk_size_bytes: int
    generation: int
    """Random 64-bit number, not 0."""
    created_ns: int
    owner: bytes
    """16 bytes, see `owner_key`."""

    @property
    def chunk_count(self) -> int:
        """Number of chunks, the last one maybe short."""
        return -(-self.version.size_bytes // self.chunk_size_bytes)

    @property
    def map_size_bytes(self) -> int:
        """Size of the map file."""
        return HEADER_SIZE_BYTES + self.chunk_count * SLOT_SIZE_BYTES

    def chunk_length(self, index: int) -> int:
        """Bytes in a chunk: the chunk size, but for the last."""
        start = index * self.chunk_size_bytes
        return min(self.chunk_size_bytes, self.version.size_bytes - start)


def owner_key(uid: str) -> bytes:
    """Return the 16 bytes that name a configuration in its maps."""
    return hashlib.sha256(uid.encode()).digest()[:16]


def is_representable(blob_id: str, version: BlobVersion, chunk_size_bytes: int) -> bool:
    """Whether a map can describe this version; what it cannot describe is not cached."""
    return (
        version.is_cacheable
        and version.size_bytes <= chunk_size_bytes * CHUNKS_MAX
        and 0 < len(blob_id.encode()) <= BLOB_ID_BYTES_MAX
        and len(version.token.encode()) <= TOKEN_BYTES_MAX
        and len((version.etag or "").encode()) <= TOKEN_BYTES_MAX
        and len((version.last_modified or "").encode()) <= LAST_MODIFIED_BYTES_MAX
    )


def encode_header(header: MapHeader) -> bytes:
    """Return the header page, without a whole-blob record."""
    version = header.version
    assert header.generation, "generation 0 would make zeros look like a record"
    assert is_representable(header.blob_id, version, header.chunk_size_bytes)
    strings = [
        header.blob_id.encode(),
        version.token.encode(),
        (version.etag or "").encode(),
        (version.last_modified or "").encode(),
    ]
    flags = _HAS_ETAG * (version.etag is not None)
    flags |= _HAS_LAST_MODIFIED * (version.last_modified is not None)
    fixed = _FIXED.pack(
        MAGIC,
        FORMAT_VERSION,
        header.chunk_size_bytes,
        header.generation,
        version.size_bytes,
        header.created_ns,
        header.owner,
        _VALIDATOR_NUMBERS[version.validator],
        flags,
        *map(len, strings),
    )
    covered = (fixed + b"".join(strings)).ljust(_CHECKSUM_OFFSET, b"\0")
    return (covered + _CRC.pack(crc32c(covered))).ljust(HEADER_SIZE_BYTES, b"\0")


def decode_header(page: bytes) -> MapHeader | None:
    """Return what a header page says, or None if it is not wholly right."""
    if len(page) < HEADER_SIZE_BYTES:
        return None
    covered = page[:_CHECKSUM_OFFSET]
    if _CRC.unpack_from(page, _CHECKSUM_OFFSET)[0] != crc32c(covered):
        return None
    magic, number, chunk_size, generation, size, created_ns, owner, kind, flags, *lengths = (
        _FIXED.unpack_from(page)
    )
    if magic != MAGIC or number != FORMAT_VERSION or not generation or kind not in _VALIDATORS:
        return None
    if not CHUNK_SIZE_BYTES_MIN <= chunk_size <= CHUNK_SIZE_BYTES_MAX:
        return None
    if chunk_size & (chunk_size - 1) or size > chunk_size * CHUNKS_MAX:
        return None
    strings = _decode_strings(covered, lengths)
    if strings is None:
        return None
    blob_id, token, etag, last_modified = strings
    version = BlobVersion(
        size,
        _VALIDATORS[kind],
        token,
        etag if flags & _HAS_ETAG else None,
        last_modified if flags & _HAS_LAST_MODIFIED else None,
    )
    return MapHeader(blob_id, version, chunk_size, generation, created_ns, owner)


def _decode_strings(covered: bytes, lengths: list[int]) -> list[str] | None:
    """Return the header's strings, or None where they do not fit or are no UTF-8."""
    if _FIXED.size + sum(lengths) > len(covered):
        return None
    strings, at = [], _FIXED.size
    for length in lengths:
        try:
            strings.append(covered[at : at + length].decode())
        except UnicodeDecodeError:
            return None
        at += length
    return strings


def encode_whole_record(generation: int, sha256: bytes) -> bytes:
    """Return the record that the whole blob was found to have this sha256."""
    return _WHOLE.pack(sha256, crc32c(_WHOLE_SEAL.pack(generation, sha256)))


NO_WHOLE_RECORD = bytes(WHOLE_RECORD_SIZE_BYTES)


def decode_whole_record(generation: int, page: bytes) -> bytes | None:
    """Return the sha256 the whole blob is known to have, or None."""
    if len(page) < HEADER_SIZE_BYTES:
        return None
    sha256: bytes
    sha256, seal = _WHOLE.unpack_from(page, WHOLE_RECORD_OFFSET)
    # The very record of zeros is "none", whatever its seal would be.
    if not any(sha256) or seal != crc32c(_WHOLE_SEAL.pack(generation, sha256)):
        return None
    return sha256


def seal_slot(generation: int, index: int, data_crc: int) -> int:
    """Return a slot's value as one number: data CRC in the low word, its seal in the high."""
    return data_crc | crc32c(_SLOT_SEAL.pack(generation, index, data_crc)) << 32


def slot_crc(generation: int, index: int, slot: int) -> int | None:
    """Return the data CRC that a slot vouches for, or None if it vouches for nothing."""
    data_crc = slot & 0xFFFFFFFF
    return data_crc if slot and seal_slot(generation, index, data_crc) == slot else None


def slot_offset(index: int) -> int:
    """Return where in the map file a slot lies."""
    return HEADER_SIZE_BYTES + index * SLOT_SIZE_BYTES


def encode_slots(slots: array[int]) -> bytes:
    """Return the bytes of consecutive slots."""
    if sys.byteorder == "little":
        return slots.tobytes()
    swapped = array("Q", slots)
    swapped.byteswap()
    return swapped.tobytes()


def decode_slots(header: MapHeader, body: bytes) -> array[int]:
    """Return one slot per chunk; bytes that are missing are absent chunks.

    Seals are not checked here but by `slot_crc` when a slot is first used: a map of a million
    slots would else delay its first reader by half a second.
    """
    wanted = header.chunk_count * SLOT_SIZE_BYTES
    slots = array("Q")
    slots.frombytes(body[:wanted].ljust(wanted, b"\0"))
    if sys.byteorder == "big":
        slots.byteswap()
    return slots
