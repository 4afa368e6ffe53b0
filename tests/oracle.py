"""The papers' algorithms in NumPy float64, one plain loop each: the truth the library is held against.

Imports neither jax nor jadam. Each takes a list of gradients ``g_1, g_2, ...`` and returns the list of directions
``u_1, u_2, ...``; the update is ``-learning_rate * u``.
"""

import numpy as np


def adam(gradients, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0):
    """Kingma & Ba 2015, Algorithm 1."""
    m = v = np.zeros_like(gradients[0], np.float64)
    directions = []
    for t, g in enumerate(gradients, start=1):
        g = np.asarray(g, np.float64)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        m_hat = m / (1 - b1**t)
        v_hat = v / (1 - b2**t)
        directions.append(m_hat / (np.sqrt(v_hat + eps_root) + eps))
    return directions


def nadam(gradients, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0):
    """Dozat 2016, Algorithm 2 with a constant momentum and, as everywhere, no further factor b2 on v_hat."""
    m = v = np.zeros_like(gradients[0], np.float64)
    directions = []
    for t, g in enumerate(gradients, start=1):
        g = np.asarray(g, np.float64)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        v_hat = v / (1 - b2**t)
        directions.append(m_hat / (np.sqrt(v_hat + eps_root) + eps))
    return directions


def descend(p, directions, learning_rate, weight_decay=0.0):
    """Loshchilov & Hutter 2019, Algorithm 2, decay times the learning rate: the parameters after each step.

    ``directions`` is a function of the gradients so far, of which ``learning_rate(t)`` is taken, t = 0, 1, ...
    """
    p = np.asarray(p, np.float64)
    path = []
    for t, u in enumerate(directions):
        p = p - learning_rate(t) * (u + weight_decay * p)
        path.append(p)
    return path
