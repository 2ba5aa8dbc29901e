"""The data API: an HTTP/1.1 server that hands blobs to readers, and nothing else.

Belongs here: framing, limits, RFC 9110 semantics, readers' tokens, sending bytes. Does not: what
a blob is, where it comes from, which configurations exist (`catalog.Catalog` answers that),
metrics and logs (`catalog.Observer` gets a record per response).

For the rest of the agent::

    server = DataServer(catalog, auth, observer, Limits())     # server.py
    host, port = await server.start("0.0.0.0", 7080)
    await server.stop(grace_seconds=25)                        # drains, then closes

    AllowAll()                                                 # tokens.py, standalone
    auth = TokenAuth(); auth.set_keys(jwks, issuer)            # tokens.py, in a cluster
"""
