"""Benchmarks, and the small models they run on."""
