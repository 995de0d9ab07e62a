"""Distances between images."""
