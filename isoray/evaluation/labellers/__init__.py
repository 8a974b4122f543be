"""Labellers of generated text behind one interface, one per file: chosen by their ``kind``."""
