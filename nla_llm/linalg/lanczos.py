"""Leading singular triplets of one large NumPy matrix: block Lanczos on AᵀA that keeps the shorter side alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm.backend import parallel, thread_count
from nla_llm.linalg.factors import SVD

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["largest_cosines", "leading_triplets"]

_OVERSAMPLING = 8  # extra columns of the block (Halko, Martinsson, Tropp 2011, section 4.2: 5 or 10)
_WORTH_THREADS = 1 << 20  # entries of a matrix from which threads pay
_LOST = 1e-12  # relative squared length below which a direction of a block is rounding


def leading_triplets(
    matrix: NDArray[Any], rank: int, rng: np.random.Generator, *, rtol: float = 0.1, max_steps: int = 8
) -> SVD:
    """The ``rank`` leading singular triplets of a matrix, from products in its own precision.

    The method of `BlockKrylov`, on NumPy arrays and with two differences that pay for large matrices: blocks are made
    orthonormal by eigenvalues of their Gram matrices, twice (SVQB, Stathopoulos and Wu 2002, SIAM J. Sci. Comput.
    23), a tenth of the time of Householder's way on tall blocks; and nothing is kept of the longer side, so that beside
    the matrix the memory is that of the shorter side times the size of the space.

    Parameters
    ----------
    matrix : array (m, n), float32 or float64
    rank : int
        1 <= rank <= min(m, n).
    rng : numpy.random.Generator
    rtol : float
        Stop when ‖AᵀU − VΘ‖ relative to θ_{rank+1} is below it; see `truncated_svd` for what follows from that.
    max_steps : int
        Most blocks.

    Returns
    -------
    SVD
        In float64: U orthonormal, A V = U Θ to rounding, so that the values are lower bounds of the singular values.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> leading_triplets(np.diag(np.arange(40.0)), 2, rng, rtol=1e-6).values.round(6).tolist()
    [39.0, 38.0]
    """
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"rank must be between 1 and {min(matrix.shape)} for a matrix {matrix.shape}, got {rank}")
    if matrix.shape[1] > matrix.shape[0]:
        u, s, v = leading_triplets(matrix.T, rank, rng, rtol=rtol, max_steps=max_steps)
        return SVD(v, s, u)
    right = _space(matrix, rank, rng, rtol, max_steps)
    image = _product(matrix, right)
    squares, turn = np.linalg.eigh(image.T @ image)
    if squares[0] <= _LOST * squares[-1]:
        u, s, vt = np.linalg.svd(image, full_matrices=False)
        return SVD(u, s, right @ vt.T)
    s, turn = np.sqrt(squares[::-1]), turn[:, ::-1]
    return SVD(image @ (turn / s), s, right @ turn)


def largest_cosines(matrix: NDArray[Any], vectors: NDArray[np.float64], *, steps: int = 12) -> NDArray[np.float64]:
    """Bound of |cos| between each vector and any left singular vector of a matrix of which none is known.

    A unit vector u gives the squared singular values of A weights, its squared cosines with the vectors. None exceeds
    the Christoffel function 1/Σ p_k(x)² of that measure, whose orthonormal polynomials p_0, …, p_{n−1} are those of n
    steps of Lanczos on AAᵀ from u (Akhiezer 1965, The Classical Moment Problem, chapter 2). Its largest value is looked
    for on a grid, forty points between neighbouring Ritz values. Where the steps end because nothing but rounding is
    left (a thousand eps, an empirical constant), the Ritz values are all that the measure has.

    Parameters
    ----------
    matrix : array (m, n), float32 or float64
    vectors : array (m, k)
        Of length one.
    steps : int
        With more of them the bound comes down.

    Returns
    -------
    array (k,)

    Examples
    --------
    >>> u = np.array([[0.6], [0.8], [0.0]])
    >>> largest_cosines(np.diag([3.0, 2.0, 1.0]), u, steps=2).round(6).tolist()
    [0.8]
    """
    u, before, beta = vectors, np.zeros_like(vectors), np.zeros(vectors.shape[1])
    alphas, betas = [], []
    for _ in range(steps):
        w = _product(matrix, _product(matrix.T, u)) - beta * before
        alphas.append(np.sum(u * w, axis=0))
        w -= alphas[-1] * u
        beta = np.linalg.norm(w, axis=0)
        betas.append(beta)
        before, u = u, w / np.where(beta > 0, beta, 1.0)
    noise = 1e3 * float(np.finfo(matrix.dtype).eps)
    pairs = zip(np.transpose(alphas), np.transpose(betas), strict=True)
    return np.array([_christoffel(alpha, beta, noise) for alpha, beta in pairs])


def _christoffel(alpha: NDArray[np.float64], beta: NDArray[np.float64], noise: float) -> float:
    """Root of the largest value of the Christoffel function; a beta that is noise says that the space was invariant."""
    ends = np.flatnonzero(beta <= noise * np.abs(alpha).max())
    n = int(ends[0]) + 1 if ends.size else alpha.size
    nodes = np.linalg.eigvalsh(np.diag(alpha[:n]) + np.diag(beta[: n - 1], 1) + np.diag(beta[: n - 1], -1))
    pad = np.concatenate([[nodes[0] * 0.9], nodes, [nodes[-1] * 1.1]])
    x = nodes if ends.size else np.unique(np.concatenate([nodes, np.linspace(pad[:-1], pad[1:], 40).ravel()]))
    total, previous, current = np.ones_like(x), np.zeros_like(x), np.ones_like(x)
    for k in range(n - 1):
        following = ((x - alpha[k]) * current - (beta[k - 1] if k else 0.0) * previous) / beta[k]
        previous, current = current, np.clip(following, -1e150, 1e150)
        total += current**2
    return float(np.sqrt(min(1.0, 1 / total.min())))


def _space(a: NDArray[Any], rank: int, rng: np.random.Generator, rtol: float, max_steps: int) -> NDArray[np.float64]:
    """Orthonormal V (n, rank) whose columns are Ritz vectors of AᵀA."""
    n = a.shape[1]
    block = _orthonormal(rng.standard_normal((n, min(rank + _OVERSAMPLING, n))))
    basis = block
    gram = np.zeros((0, 0))
    for step in range(1, max_steps + 1):
        pulled = _product(a.T, _product(a, block))
        corner = basis.T @ pulled  # a column of blocks of Vᵀ AᵀA V
        gram = _bordered(gram, corner)
        rest = pulled - basis @ corner
        rest -= basis @ (basis.T @ rest)
        squares, vectors = np.linalg.eigh(gram)
        squares, vectors = np.maximum(squares[::-1], 0.0), vectors[:, ::-1]
        known = min(rank, squares.size)
        theta = np.sqrt(squares[:known])
        following = np.sqrt(squares[min(rank, squares.size - 1)])
        with np.errstate(divide="ignore", invalid="ignore"):
            residual = rest @ np.where(theta > 0, vectors[-block.shape[1] :, :known] / theta, 0.0)
        small = np.finfo(a.dtype).eps * np.sqrt(squares[0] * n)
        if step == max_steps or np.sqrt(np.linalg.eigvalsh(residual.T @ residual)[-1]) <= max(rtol * following, small):
            break
        block = _orthonormal(rest, float(squares[0]))
        if basis.shape[1] + block.shape[1] > n or block.shape[1] == 0:
            break
        block = _orthonormal(block - basis @ (basis.T @ block))
        basis = np.concatenate([basis, block], axis=1)
    found = basis @ vectors[:, :rank]
    return found if found.shape[1] == rank else _filled(found, rank, rng)


def _product(a: NDArray[Any], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """``a @ x`` in the precision of a, by blocks of rows from threads of our own."""
    narrow = x.astype(a.dtype, copy=False)
    out = np.empty((a.shape[0], x.shape[1]))
    step = -(-a.shape[0] // thread_count()) if a.size > _WORTH_THREADS else a.shape[0]

    def rows(start: int) -> None:
        out[start : start + step] = a[start : start + step] @ narrow

    parallel(rows, range(0, a.shape[0], step))
    return out


def _bordered(gram: NDArray[np.float64], column: NDArray[np.float64]) -> NDArray[np.float64]:
    """The Gram matrix with one more column of blocks, symmetric."""
    old, width = gram.shape[0], column.shape[1]
    whole = np.empty((old + width, old + width))
    whole[:old, :old] = gram
    whole[:, old:] = column
    whole[old:, :old] = column[:old].T
    whole[old:, old:] = 0.5 * (column[old:] + column[old:].T)
    return whole


def _orthonormal(x: NDArray[np.float64], scale: float = 0.0) -> NDArray[np.float64]:
    """Orthonormal basis of the columns, without directions that are rounding beside the longest or beside ``scale``."""
    for _ in range(2):
        if x.shape[1] == 0:
            break
        squares, vectors = np.linalg.eigh(x.T @ x)
        floor = max(_LOST * float(squares[-1]), (np.finfo(np.float64).eps * scale) ** 2)
        keep = squares > floor
        x = x @ (vectors[:, keep] / np.sqrt(squares[keep]))
        scale = 0.0
    return x


def _filled(v: NDArray[np.float64], rank: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Orthonormal columns added at random where the matrix has fewer directions than were asked for."""
    more = rng.standard_normal((v.shape[0], rank - v.shape[1]))
    for _ in range(2):
        more = _orthonormal(more - v @ (v.T @ more))
    return np.concatenate([v, more], axis=1)
