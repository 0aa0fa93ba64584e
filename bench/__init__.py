"""Measurements of our own server and engines: comparisons, ladders, soaks, plans, their figures."""
import cbserver  # noqa: F401  before torch, whose threads it tells not to spin
