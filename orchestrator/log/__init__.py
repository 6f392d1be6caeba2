"""The log of checkpoints: who leads the run, which checkpoints count, and which are kept."""
