"""Benchmarks: every peer gets the same numbers, is compared with the truth, and only then timed. docs/method.md."""
