"""`python -m blobcache_agent`, and the console script `blobcache-agent`."""

from __future__ import annotations

from blobcache_agent.cli import main

if __name__ == "__main__":
    main()
