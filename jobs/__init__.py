"""Batch work on Ray Data and Ray Train, and the `alit` command line."""
