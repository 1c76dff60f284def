"""Decoding: lists, slates and rollouts of any policy over any action space."""
