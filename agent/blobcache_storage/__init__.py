"""The engine: an asyncio library that fetches, verifies, keeps and serves immutable blobs.

Belongs here: the factory, cache managers, backends, the on-disk format, the eviction planner and
the conformance kit. Does not: Kubernetes, an HTTP server, command lines, logging set-up.
"""
