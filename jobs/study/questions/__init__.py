"""What studies ask, one file for each question."""
