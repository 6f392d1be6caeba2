"""Fits of what studies measure, as pure functions of numbers: each with an interval, or refused with the reason."""
