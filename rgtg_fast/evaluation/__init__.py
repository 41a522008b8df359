"""Measures guides and decoding: accuracy on pairs, studies under judges, the published algorithms, and their timing."""
