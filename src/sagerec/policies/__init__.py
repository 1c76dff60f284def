"""Policies: what writes items token by token, behind one small protocol."""
