"""Trains reward models on packed preference pairs, every prefix of both answers in one forward."""
