"""Policies: what writes items token by token. `protocol` is what the rest knows of them, `registry` makes them."""
