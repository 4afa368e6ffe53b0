"""Wrappers of optimizers: chain and clipping, exact bf16 parameters, settings by path, parameter averages."""
