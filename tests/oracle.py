"""Reference implementations in NumPy float64: each paper's algorithm as one plain loop.

This module imports neither jax nor jadam. Each function takes a list of gradients ``g_1, g_2, ...`` and returns the
list of directions ``u_1, u_2, ...``. The update is ``-learning_rate * u``.
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


def adam_hat(gradients, b1=0.9, b2=0.999, eps=1e-8):
    """Kingma & Ba 2015, end of section 2: eps before the correction of v, as in TensorFlow's ``AdamOptimizer``."""
    m = v = np.zeros_like(gradients[0], np.float64)
    directions = []
    for t, g in enumerate(gradients, start=1):
        g = np.asarray(g, np.float64)
        alpha_t = np.sqrt(1 - b2**t) / (1 - b1**t)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        directions.append(alpha_t * m / (np.sqrt(v) + eps))
    return directions


def adam_uncorrected(gradients, b1=0.9, b2=0.999, eps=1e-8):
    """Kingma & Ba 2015, section 6.4: RMSProp with momentum, no bias correction."""
    m = v = np.zeros_like(gradients[0], np.float64)
    directions = []
    for g in gradients:
        g = np.asarray(g, np.float64)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        directions.append(m / (np.sqrt(v) + eps))
    return directions


def adam_scheduled(gradients, b1, b2, eps=1e-8):
    """Adam with betas that are functions of t = 0, 1, ... (Theorem 4.1), corrected by one minus their products."""
    m = v = np.zeros_like(gradients[0], np.float64)
    product1 = product2 = 1.0
    directions = []
    for t, g in enumerate(gradients):
        g = np.asarray(g, np.float64)
        m = b1(t) * m + (1 - b1(t)) * g
        v = b2(t) * v + (1 - b2(t)) * g**2
        product1, product2 = product1 * b1(t), product2 * b2(t)
        directions.append(m / (1 - product1) / (np.sqrt(v / (1 - product2)) + eps))
    return directions


def nadam(gradients, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0):
    """Dozat 2016, Algorithm 2, constant momentum. Its extra factor b2 on v_hat is left out, as in Optax and PyTorch."""
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


def nadam_scheduled(gradients, mu, b2=0.999, eps=1e-8):
    """Dozat 2016, Algorithm 2, momentum ``mu`` a function of t = 0, 1, ..."""
    m = v = np.zeros_like(gradients[0], np.float64)
    product = 1.0
    directions = []
    for t, g in enumerate(gradients):
        g = np.asarray(g, np.float64)
        m = mu(t) * m + (1 - mu(t)) * g
        v = b2 * v + (1 - b2) * g**2
        product *= mu(t)
        m_hat = mu(t + 1) * m / (1 - product * mu(t + 1)) + (1 - mu(t)) * g / (1 - product)
        directions.append(m_hat / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps))
    return directions


def adamax(gradients, b1=0.9, b2=0.999, eps=1e-8):
    """Kingma & Ba 2015, Algorithm 2, with eps added to |g| as in Optax and PyTorch."""
    m = u = np.zeros_like(gradients[0], np.float64)
    directions = []
    for t, g in enumerate(gradients, start=1):
        g = np.asarray(g, np.float64)
        m = b1 * m + (1 - b1) * g
        u = np.maximum(b2 * u, np.abs(g) + eps)
        directions.append(m / ((1 - b1**t) * u))
    return directions


def amsgrad(gradients, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, max_of="v_hat", corrected=True):
    """Reddi, Kale & Kumar 2018, Algorithm 2. ``corrected`` adds Adam's bias corrections."""
    m = v = largest = np.zeros_like(gradients[0], np.float64)
    directions = []
    for t, g in enumerate(gradients, start=1):
        g = np.asarray(g, np.float64)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        c1, c2 = (1 - b1**t, 1 - b2**t) if corrected else (1, 1)
        if max_of == "v_hat":
            largest = np.maximum(largest, v / c2)
            v_hat = largest
        else:
            largest = np.maximum(largest, v)
            v_hat = largest / c2
        directions.append(m / c1 / (np.sqrt(v_hat + eps_root) + eps))
    return directions


def radam(gradients, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, threshold=5.0, nesterov=False):
    """Liu et al. 2020, Algorithm 2."""
    m = v = np.zeros_like(gradients[0], np.float64)
    rho_inf = 2 / (1 - b2) - 1
    directions = []
    for t, g in enumerate(gradients, start=1):
        g = np.asarray(g, np.float64)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        m_hat = m / (1 - b1**t)
        if nesterov:
            m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
        if rho >= threshold:
            r = np.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
            directions.append(r * m_hat / (np.sqrt(v / (1 - b2**t) + eps_root) + eps))
        else:
            directions.append(m_hat)
    return directions


def scale_by_learning_rate_and_decay(p, directions, learning_rate, weight_decay=0.0):
    """Parameters after each step: Loshchilov & Hutter 2019, Algorithm 2, with decay times the learning rate.

    ``learning_rate`` is a function of t = 0, 1, ...
    """
    p = np.asarray(p, np.float64)
    path = []
    for t, u in enumerate(directions):
        p = p - learning_rate(t) * (u + weight_decay * p)
        path.append(p)
    return path
