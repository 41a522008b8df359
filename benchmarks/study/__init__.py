"""The comparison of decoding methods that the documentation reports."""
