"""Snapshots: the state of every rank after a step, in memory that outlives the worker."""
