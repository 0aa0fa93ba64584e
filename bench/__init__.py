"""Measurements of our own server and engines: comparisons, ladders, soaks, plans, their figures."""
