"""Numerics with tensor trains: manifolds, and what computes with trains."""
