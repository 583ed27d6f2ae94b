"""Orthogonal matrices that mix channels evenly: Hadamard matrices with random signs, and random rotations.

Hadamard matrices of order n = 2^k·m: Sylvester's doubling of m = 1, of Paley's first construction (m = q + 1, q a prime
of the form 4j + 3) or of his second (m = 2(q + 1), q a prime of the form 4j + 1).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def hadamard(n: int) -> Matrix | None:
    """A Hadamard matrix of order n over √n; None where these constructions have none."""
    order, doublings = n, 0
    while True:
        base = _paley(order) if order > 2 else np.array([[1.0]]) if order == 1 else None
        if base is not None:
            for _ in range(doublings):
                base = np.block([[base, base], [base, -base]])
            return np.asarray(base / np.sqrt(n))
        if order % 2 or order < 2:
            return None
        order, doublings = order // 2, doublings + 1


def rotation(n: int, rng: np.random.Generator, *, random: bool, keeps_mean: bool) -> Matrix:
    """An orthogonal matrix Q (n, n).

    Args:
        n: channels.
        rng: of its signs or numbers.
        random: a uniformly random rotation; otherwise a Hadamard matrix with random signs where there is one.
        keeps_mean: Q·1 = 1, so that a mean over channels, and its subtraction, commute with Q.
    """
    h = None if random else hadamard(n)
    if not keeps_mean:
        return _random(n, rng) if h is None else np.asarray(rng.choice((-1.0, 1.0), n)[:, None] * h)
    # In a basis whose first vector is 1/√n, what leaves that vector alone acts on the others: (1, R).
    axis = np.full(n, n**-0.5)
    axis[0] -= 1
    basis = np.eye(n) if n == 1 else np.eye(n) - 2 * np.outer(axis, axis) / (axis @ axis)
    inner = np.eye(n)
    inner[1:, 1:] = _random(n - 1, rng)
    return np.asarray(basis @ inner @ basis.T)


def _random(n: int, rng: np.random.Generator) -> Matrix:
    """Uniform over rotations (Mezzadri 2007, *How to generate random matrices from the classical compact groups*)."""
    q, r = np.linalg.qr(rng.normal(size=(n, n)))
    return np.asarray(q * np.sign(np.diag(r)))


def _paley(n: int) -> Matrix | None:
    if n % 4:
        return None
    if _prime(n - 1) and (n - 1) % 4 == 3:
        s = np.ones((n, n))
        s[0, 0] = 0
        s[1:, 0] = -1
        s[1:, 1:] = _jacobsthal(n - 1)
        return s + np.eye(n)
    q = n // 2 - 1
    if _prime(q) and q % 4 == 1:
        c = np.ones((q + 1, q + 1))
        c[0, 0] = 0
        c[1:, 1:] = _jacobsthal(q)
        return np.asarray(np.kron(c, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1), [[1, -1], [-1, -1]]))
    return None


def _jacobsthal(q: int) -> Matrix:
    """χ(i − j) of the quadratic residues modulo q."""
    chi = -np.ones(q)
    chi[[i * i % q for i in range(1, q)]] = 1
    chi[0] = 0
    return np.asarray(chi[np.subtract.outer(np.arange(q), np.arange(q)) % q])


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
