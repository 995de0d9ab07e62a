"""Criteria for enough tokens, the batching of iterations, and the results of encoding."""
