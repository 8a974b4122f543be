"""Objectives: one file per loss, and ``reduce.py`` with the only masked reductions."""
