"""Measuring: the table of methods, the published algorithms, timing and the memory floor."""
