"""Data, problems and training loop of `benchmarks.claims`, the same for all optimizers."""

import collections
import functools
import gzip
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

DATA = Path(__file__).parent / "data"
TEST_SHARE = 0.2


class Problem(NamedTuple):
    """A model with its data."""

    init: Callable  # init(key) -> parameters
    loss: Callable  # loss(parameters, row numbers of the training set, key) -> scalar
    error: Callable  # error(parameters) -> share of test examples that are classified wrongly
    rows: int  # size of the training set


def split(inputs, labels):
    """Training and test set."""
    n = round(len(labels) * (1 - TEST_SHARE))
    return (inputs[:n], labels[:n]), (inputs[n:], labels[n:])


@functools.cache
def digits():
    """Images as rows of 784 pixels in [0, 1], and their digits."""
    with np.load(DATA / "mnist10k.npz") as file:
        images, labels = file["images"], file["labels"]
    return split(images.reshape(len(images), -1).astype(np.float32) / 255, labels.astype(np.int32))


@functools.cache
def reviews(words=10_000):
    """Sentences as the numbers of their distinct words, padded with ``words``; labels are 1 for positive ratings.

    The vocabulary is the most frequent words of the training set, as in section 6.1 of the paper.
    """
    with gzip.open(DATA / "movie_reviews.tsv.gz", "rt", encoding="utf-8") as file:
        ratings, texts = zip(*(line.rstrip("\n").split("\t") for line in list(file)[1:]), strict=True)
    order = np.random.default_rng(0).permutation(len(texts))  # the file is sorted by the rating's sign
    sentences = [sorted(set(re.findall(r"[a-z']+", texts[i].lower()))) for i in order]
    count = collections.Counter(word for sentence in split(sentences, order)[0][0] for word in sentence)
    number = {word: i for i, (word, _) in enumerate(count.most_common(words))}
    table = np.full((len(sentences), max(map(len, sentences))), words, np.int32)
    for row, sentence in zip(table, sentences, strict=True):
        known = [number[word] for word in sentence if word in number]
        row[: len(known)] = known
    return split(table, (np.array(ratings, float)[order] > 0).astype(np.int32))


def wrong_labels(labels, share, classes=10):
    """``labels`` with a share of them, on average, replaced by another class, uniformly."""
    rng = np.random.default_rng(0)
    other = (labels + rng.integers(1, classes, len(labels))) % classes
    return np.where(rng.random(len(labels)) < share, other, labels).astype(np.int32)


def cross_entropy(logits, labels):
    """Mean cross-entropy, nats per example."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def drop(x, rate, key):
    """Dropout with probability ``rate``, the others scaled by 1 / (1 - rate)."""
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def dense(key, n_in, n_out, scale=2.0):
    """Normal weights of variance ``scale / n_in``, and a zero bias."""
    return jax.random.normal(key, (n_in, n_out)) * jnp.sqrt(scale / n_in), jnp.zeros(n_out)


def network(hidden=(), dropout=0.0, noise=0.0) -> Problem:
    """Digit classifier with these hidden layers (ReLU and dropout after each); without any, logistic regression."""
    (images, labels), (test_images, test_labels) = (tuple(map(jnp.asarray, pair)) for pair in digits())
    labels = jnp.asarray(wrong_labels(np.asarray(labels), noise))
    widths = (images.shape[1], *hidden, 10)

    def init(key):
        scales = [2.0] * len(hidden) + [0.0]  # the last layer starts at 0: uniform class probabilities
        keys = jax.random.split(key, len(scales))
        return [dense(*layer) for layer in zip(keys, widths[:-1], widths[1:], scales, strict=True)]

    def logits(params, x, key=None):
        for i, (w, b) in enumerate(params[:-1]):
            x = jax.nn.relu(x @ w + b)
            x = drop(x, dropout, jax.random.fold_in(key, i)) if key is not None and dropout else x
        w, b = params[-1]
        return x @ w + b

    loss = lambda params, rows, key: cross_entropy(logits(params, images[rows], key), labels[rows])
    error = lambda params: (logits(params, test_images).argmax(-1) != test_labels).mean()
    return Problem(init, loss, error, len(labels))


def bag_of_words(dropout=0.5, words=10_000) -> Problem:
    """Logistic regression of the reviews' sentiment on bags of words, with dropout of the inputs."""
    (table, labels), (test_table, test_labels) = (tuple(map(jnp.asarray, pair)) for pair in reviews(words))

    def features(table, key=None):
        present = jnp.ones(table.shape) if key is None else drop(jnp.ones(table.shape), dropout, key)
        row = jnp.arange(len(table))[:, None]
        return jnp.zeros((len(table), words)).at[row, table].add(present, mode="drop")

    def loss(params, rows, key):
        w, b = params
        return optax.sigmoid_binary_cross_entropy(features(table[rows], key) @ w + b, labels[rows]).mean()

    def error(params):
        w, b = params
        return ((features(test_table) @ w + b > 0) != test_labels).mean()

    return Problem(lambda key: (jnp.zeros(words), jnp.zeros(())), loss, error, len(labels))


def autoencoder(hidden=100, latent=10) -> Problem:
    """Variational autoencoder of the digits; its loss is the negative ELBO, nats per digit."""
    (images, _), _ = digits()
    images = jnp.asarray(images)

    def init(key):
        shapes = [(784, hidden), (hidden, 2 * latent), (latent, hidden), (hidden, 784)]
        keys = jax.random.split(key, len(shapes))
        return [dense(key, *shape, scale=1.0) for key, shape in zip(keys, shapes, strict=True)]

    def loss(params, rows, key):
        (w1, b1), (w2, b2), (w3, b3), (w4, b4) = params
        x = images[rows]
        code = jax.nn.softplus(x @ w1 + b1) @ w2 + b2
        mean, log_variance = code[:, :latent], code[:, latent:]
        z = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
        pixels = jax.nn.softplus(z @ w3 + b3) @ w4 + b4
        divergence = 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance).sum(-1)
        return (optax.sigmoid_binary_cross_entropy(pixels, x).sum(-1) + divergence).mean()

    return Problem(init, loss, lambda params: jnp.nan, len(images))


def trainer(problem: Problem, make, steps: int, points: int = 10, batch: int = 128, evaluated: int = 2000):
    """Jitted function ``(rates, seeds) -> (training loss (seed, rate, point), test error (seed, rate))``.

    ``make(rate)`` returns the optimizer. All rates of a seed share initial parameters, batches (drawn with replacement)
    and noise. The loss is measured ``points`` times, equally spaced, the last time at the end, on the first
    ``evaluated`` rows of the training set, with noise as in training but always the same draw.
    """

    def one_seed(rates, seed):
        key = jax.random.key(seed)
        rows_key, noise_key, init_key, evaluation_key = jax.random.split(key, 4)

        def step(carry, t):
            rows = jax.random.randint(jax.random.fold_in(rows_key, t), (batch,), 0, problem.rows)
            noise = jax.random.fold_in(noise_key, t)

            def one_rate(rate, params, state):
                grads = jax.grad(problem.loss)(params, rows, noise)
                updates, state = make(rate).update(grads, state, params)
                return optax.apply_updates(params, updates), state

            return jax.vmap(one_rate)(rates, *carry), None

        def part(carry, times):
            carry, _ = jax.lax.scan(step, carry, times)
            loss = lambda params: problem.loss(params, jnp.arange(evaluated), evaluation_key)
            return carry, jax.vmap(loss)(carry[0])

        start = problem.init(init_key)
        begin = lambda rate: (start, make(rate).init(start))
        (params, _), losses = jax.lax.scan(part, jax.vmap(begin)(rates), jnp.arange(steps).reshape(points, -1))
        return losses.T, jax.vmap(problem.error)(params) * jnp.ones(len(rates))

    return jax.jit(lambda rates, seeds: jax.lax.map(lambda seed: one_seed(rates, seed), seeds))
