"""Declared grids of runs, and what came of them as tables and pictures."""
