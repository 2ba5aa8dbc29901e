"""Origins: one module a backend, the shared HTTP road, and what keeps an origin at peace.

Belongs here: requests, signatures, tokens, retries, breakers, address rules. Does not: chunks,
cache files.
"""
