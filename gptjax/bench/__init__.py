"""Benchmarks that print figures; what they measured on real devices is kept in `results/`."""
