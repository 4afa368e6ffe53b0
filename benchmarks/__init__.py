"""Measurements too long for the tests: ``python -m benchmarks NAME``, results as JSON in ``benchmarks/results``."""
