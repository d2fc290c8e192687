"""Benchmarks of speed and memory; ``tools/benchmark.py`` runs them."""
