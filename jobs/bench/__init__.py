"""Measurements against rivals, in one run and as ratios."""
