"""Descriptions, statistics and memory plans of optimizers."""
