"""Corpora: rows read with Ray Data become packed blocks on disk, and blocks become a stream that any step can enter."""
