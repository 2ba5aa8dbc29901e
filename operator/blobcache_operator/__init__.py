"""
The operator: kopf's wake-ups, a pure core, pushes to agents, statuses.

Belongs here: everything that talks to the API server or decides across nodes. Does not: caching,
reading origins, anything a node could decide by itself. The core (`snapshot`, `admission`,
`reconcile`, `rollup`, `node_rollup`, `evictions`, `budget`, `conditions`, `certificates`) neither
waits nor reads a clock; `loop` feeds it.
"""
