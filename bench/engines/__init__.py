"""Peers, each run by a small program of its own in an environment of its own."""
