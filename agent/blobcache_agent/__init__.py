"""The node agent: the daemon around the engine.

Belongs here: command line, data API (`data/`), control API, standalone mode, translation of
resources into the engine's configuration, metrics and health. Does not: fetching, caching or
evicting blobs (`blobcache_storage`), anything that talks to the Kubernetes API.
"""

from importlib.metadata import version

__version__ = version("blobcache")
