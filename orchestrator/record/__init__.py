"""The record: what happened, in MLflow, in the journal, and in words."""
