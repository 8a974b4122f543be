"""Evaluation: one file per family of measures."""
