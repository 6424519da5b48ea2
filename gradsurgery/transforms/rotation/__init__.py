"""Weights in rotated coordinates, in place and as parameters of their own."""
