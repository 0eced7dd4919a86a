"""Ranks that are found while a model trains: priors, gates, growth, pruning, and the rank of one matrix."""
