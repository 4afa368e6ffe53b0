"""The family, declared once: every contract test runs over every row."""

from collections.abc import Callable
from typing import NamedTuple

import optax
import oracle

import jadam


class Member(NamedTuple):
    """One optimizer: how to make it, its Optax namesake and its oracle."""

    name: str
    make: Callable  # make(learning_rate, **settings) -> transformation
    optax: Callable  # Optax's function of the same name, whose state and signature ours must have
    oracle: Callable  # oracle(gradients, **settings) -> directions
    settings: dict  # non-default settings, all of which the oracle knows too
    weight_decay: float = 0.0

    def __str__(self):
        return self.name


FAMILY = [
    Member("adam", jadam.adam, optax.adam, oracle.adam, {"b1": 0.8, "b2": 0.95, "eps": 1e-4, "eps_root": 1e-6}),
    Member("adamw", jadam.adamw, optax.adamw, oracle.adam, {"b1": 0.85, "b2": 0.9, "eps": 1e-3}, 1e-4),
]
