"""Caches and their managers: chunks, files, fills, reads, quota and eviction on disk.

Belongs here: all that touches the cache root. Does not: HTTP, origins other than
through `backend.base`.
"""
