"""The pull half of an OCI registry on the data port, for containerd; see docs/mirror.md.

Here: who may pull what, and which cached blob answers. Not here: sending (data), caching and
asking registries (blobcache_storage).
"""
