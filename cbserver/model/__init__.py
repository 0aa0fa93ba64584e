"""Given, not taught: what the engines need of a model. Loading, sampling, attention."""
