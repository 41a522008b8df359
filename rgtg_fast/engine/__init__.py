"""The decode loop, its batch and its results."""
