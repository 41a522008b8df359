"""Measures reward models and decoding methods: accuracy on preference pairs, and studies under judges."""
