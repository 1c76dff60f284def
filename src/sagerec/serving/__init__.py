"""Serving: what a run recommends, over HTTP and for many users at once.

`versions` are snapshots of a run, and `store` swaps them; `queries` says what may be asked, `answers` and `rows` decode
a batch of it, which `batching` gathers; `app` is HTTP behind a `gate`; `server` starts the processes; `lists` is the
batch without a server.
"""
