"""isoray: what training data does to a language model, as jobs on a Ray cluster."""

__version__ = "0.1.0"
