"""Benchmarks: one file per question; each prints a table of ratios taken side by side and writes JSON."""
