"""The laws of the operator algebra, by one table: a new class gets all of them with a new row."""

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.operators import (
    Averaged,
    BlockLowRank,
    CausalLowRank,
    Dense,
    Diagonal,
    Grouped,
    LowRank,
    MonarchMatrix,
    Operator,
    Panel,
    Permutation,
    Product,
    RowNormalised,
    Scaled,
    SegmentDiagonal,
    Segments,
    Selection,
    Skeleton,
    SoftmaxAttention,
    SortedBlocks,
    Step,
    SteppedLowRank,
    Sum,
    TiledSparse,
    Transpose,
    Widened,
)
from nla_llm.operators.sorted_blocks import cut_into_blocks

N_Q, N_K, D = 23, 17, 5


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def softmax(n_q, n_k, **options):
    return lambda batch: SoftmaxAttention(draw(1, *batch, n_q, D), draw(2, *batch, n_k, D), scale=0.7, **options)


def causal(chunk, *, decay):
    def make(batch):
        chunks = -(-N_Q // chunk)
        factors = np.exp(-np.abs(draw(5, *batch, chunks, D))) if decay else None
        return CausalLowRank(draw(3, *batch, N_Q, D), draw(4, *batch, N_Q, D), decay=factors, chunk=chunk)

    return make


def segment_diagonal(n_q, n_k, m):
    def make(batch):
        rows, columns = Segments(n_q, m), Segments(n_k, m)
        filled = rows.filled[:, :, None] & columns.filled[:, None, :]
        return SegmentDiagonal(np.where(filled, draw(8, *batch, *filled.shape), 0), rows, columns)

    return make


def tiles(*, ordered):
    """Two panels, keys of the second per head; or the sum of two matrices of single rows in orders of their own."""

    def make(batch):
        rng = np.random.default_rng(6)
        if ordered:
            order = np.argsort(rng.random((*batch, 2, N_Q)), axis=-1)
            panel = Panel(draw(6, *batch, 2 * N_Q, 1, 4), rng.integers(0, N_K, (*batch, 2 * N_Q, 4)))
            return TiledSparse([panel], (*batch, N_Q, N_K), order=order)
        panels = [
            Panel(draw(6, *batch, 4, 5, 7), rng.integers(0, N_K, (4, 7))),
            Panel(draw(7, *batch, 1, 3, 9), rng.integers(0, N_K, (*batch, 1, 9))),
        ]
        return TiledSparse(panels, (*batch, N_Q, N_K))

    return make


def sorted_blocks(batch):
    """Five blocks of queries and of keys in orders that differ from head to head; a third of the keys is in none."""
    queries = cut_into_blocks(np.argsort(draw(6, *batch, N_Q), axis=-1), 5, None, like=np.zeros(1))
    keys = cut_into_blocks(np.argsort(draw(7, *batch, N_K), axis=-1), 5, mask(N_K), like=np.zeros(1))
    filled = queries.filled[..., :, None] & keys.filled[..., None, :]
    return SortedBlocks(np.where(filled, draw(8, *filled.shape), 0), queries, keys)


def stepped(*, backwards):
    """Keys that lie at least four before, or behind, the tile of a row; some keys never enter."""

    def make(batch):
        rows, cuts = [0, 5, 10, 20, N_Q], [0, 3, 3, 11]
        steps = [Step(a, b, c, e) for a, b, c, e in zip(rows, rows[1:], [0, *cuts], cuts, strict=False)]
        if backwards:
            steps = [Step(N_Q - s.last_row, N_Q - s.first_row, N_K - s.last_key, N_K - s.first_key) for s in steps]
        decay = np.exp(-np.abs(draw(5, *batch, 2, D)))
        return SteppedLowRank(draw(3, *batch, N_Q, D), draw(4, *batch, N_K, D), decay, steps)

    return make


def low_rank_blocks(batch):
    """Boxes of six tokens; the last one of the rows and of the columns is shorter, one box of rows has two blocks."""
    rows, columns = np.array([0, 1, 3, 3]), np.array([1, 0, 2, 0])
    left, right = draw(8, *batch, 4, 2, 6), draw(9, *batch, 4, 2, 6)
    left[..., 2:, :, N_Q - 18 :] = 0
    right[..., 2, :, N_K - 12 :] = 0
    return BlockLowRank(left, right, rows, columns, (*batch, N_Q, N_K))


def monarch(batch):
    """Blocks of five queries and four keys, the last ones shorter."""
    right = draw(9, *batch, 5, 5, 4)
    right[..., 4, :, 1:] = 0
    return MonarchMatrix(draw(8, *batch, 5, 5, 5), right, (*batch, N_Q, N_K))


def mask(n):
    keep = np.arange(n) % 3 != 1
    keep[0] = True
    return keep


TABLE = {
    "dense": lambda batch: Dense(draw(0, *batch, N_Q, N_K)),
    "low rank": lambda batch: LowRank(draw(0, *batch, N_Q, D), draw(1, *batch, N_K, D)),
    "causal low rank": causal(4, decay=False),
    "causal low rank, one chunk": causal(64, decay=False),
    "causal low rank with decay": causal(4, decay=True),
    "softmax": softmax(N_Q, N_K),
    "softmax causal": softmax(N_Q, N_Q, causal=True),
    "softmax window": softmax(N_Q, N_Q, window=4),
    "softmax causal window": softmax(N_Q, N_Q, causal=True, window=4),
    "softmax mask": softmax(N_Q, N_K, key_mask=mask(N_K)),
    "softmax causal mask": softmax(N_Q, N_Q, causal=True, key_mask=mask(N_Q)),
    "softmax bias": softmax(N_Q, N_K, bias=draw(9, N_Q, N_K)),
    "row normalised": lambda batch: RowNormalised(LowRank(abs(draw(0, *batch, N_Q, D)), abs(draw(1, *batch, N_K, D)))),
    "row normalised causal": lambda batch: RowNormalised(
        CausalLowRank(abs(draw(0, *batch, N_Q, D)), abs(draw(1, *batch, N_Q, D)), chunk=4)
    ),
    "scaled": lambda batch: Scaled(-2.5, Dense(draw(0, *batch, N_Q, N_K))),
    "scaled by batch": lambda batch: Scaled(draw(7, *batch), LowRank(draw(0, N_Q, D), draw(1, N_K, D))),
    "selection": lambda batch: Selection(np.broadcast_to(np.array([3, 1, 16]), (*batch, 3)), N_K, like=np.zeros(1)),
    "skeleton": lambda batch: Skeleton(
        softmax(N_Q, 4)(batch),
        draw(6, *batch, 4, 3),
        LowRank(draw(0, 3, D), draw(1, N_K, D)),
        intersection=draw(8, 3, 4),
    ),
    "diagonal": lambda batch: Diagonal(draw(0, *batch, N_Q)),
    "tiles": tiles(ordered=False),
    "tiles of rows, ordered": tiles(ordered=True),
    "stepped low rank": stepped(backwards=False),
    "stepped low rank, backwards": stepped(backwards=True),
    "sum": lambda batch: Sum(softmax(N_Q, N_K)(batch), LowRank(draw(0, N_Q, D), draw(1, N_K, D))),
    "product": lambda batch: Product(softmax(N_Q, N_K)(batch), LowRank(draw(0, N_K, D), draw(1, N_Q, D))),
    "averaged": lambda batch: Averaged([softmax(N_Q, N_K)((*batch, g)) for g in (2, 1)]),
    "segment diagonal": segment_diagonal(N_Q, N_K, 5),
    "segment diagonal, full segments": segment_diagonal(24, 16, 4),
    "groups": lambda batch: Grouped(np.array([0, 4, 4, 9, N_K]), like=np.zeros(1)),
    "groups, masked": lambda batch: Grouped(
        np.array([0, *range(5, N_K + 1)]), like=np.zeros(1), mask=np.broadcast_to(mask(N_K), (*batch, N_K))
    ),
    "low-rank blocks": low_rank_blocks,
    "permutation": lambda batch: Permutation(np.argsort(draw(6, *batch, N_Q), axis=-1), like=np.zeros(1)),
    "monarch": monarch,
    "sorted blocks": sorted_blocks,
    "widened": lambda batch: Widened(draw(0, *batch, N_Q, N_K).astype(np.float32)),
    "transpose": lambda batch: Transpose(softmax(N_Q, N_K)(batch)),
}
BATCHES = {"matrix": (), "heads": (3,), "grouped": (2, 3)}


@pytest.fixture(params=TABLE)
def make(request):
    return TABLE[request.param]


@pytest.fixture(params=BATCHES)
def op(make, request) -> Operator:
    return make(BATCHES[request.param])


def close(a, b, scale=1.0):
    """Equal up to rounding: both are sums of fewer than 100 products of the size of ``scale``."""
    np.testing.assert_allclose(a, b, rtol=0, atol=100 * np.finfo(np.float64).eps * max(scale, np.abs(b).max()))


def test_every_class_has_a_row():
    nl.methods()  # loads whatever methods define
    seen = {type(make(())) for make in TABLE.values()}
    assert seen == {cls for cls in Operator.__subclasses__() if cls.__module__.startswith("nla_llm.")}


def test_apply_agrees_with_dense(op):
    x = draw(11, op.shape[-1], 3)
    close(op @ x, op.dense() @ x, np.abs(op.dense()).sum(-1).max())


def test_apply_to_batched_columns(op):
    x = draw(11, *op.batch_shape, op.shape[-1], 3)
    close(op @ x, op.dense() @ x, np.abs(op.dense()).sum(-1).max())


def test_apply_to_a_vector(op):
    x = draw(12, op.shape[-1])
    close(op @ x, op.dense() @ x, np.abs(op.dense()).sum(-1).max())


def test_adjoint(op):
    y = draw(13, op.shape[-2], 3)
    close(op.T @ y, np.swapaxes(op.dense(), -1, -2) @ y, np.abs(op.dense()).sum(-2).max())
    assert op.T.T.shape == op.shape


def test_adjoint_identity(op):
    x, y = draw(14, op.shape[-1]), draw(15, op.shape[-2])
    scale = np.abs(op.dense()).sum(axis=(-1, -2)).max()
    close(np.sum((op.T @ y) * x, axis=-1), np.sum(y * (op @ x), axis=-1), scale)


def test_multiplication_from_the_left(op):
    y = draw(16, 2, op.shape[-2])
    close(y @ op, y @ op.dense(), np.abs(op.dense()).sum(-2).max())


def test_rows_are_those_of_the_dense_matrix(op):
    assert op.dense().shape == op.shape
    close(op.rows(2, 9), op.dense()[..., 2:9, :])
    n = op.shape[-2]
    close(op.rows(n - 1, n + 5), op.dense()[..., n - 1 :, :])


def test_row_sums(op):
    close(op.row_sums(), op.dense().sum(-1), np.abs(op.dense()).sum(-1).max())


def test_nonnegative_is_only_claimed_where_true(op):
    if op.nonnegative:
        assert op.dense().min() >= 0


def test_algebra_agrees_with_dense_algebra(op):
    other = Dense(draw(17, *op.shape[-2:]))
    scale = np.abs(op.dense()).max() + np.abs(other.dense()).max()
    close((op + other).dense(), op.dense() + other.dense(), scale)
    close((op - other).dense(), op.dense() - other.dense(), scale)
    close((3 * op).dense(), 3 * op.dense(), scale)
    close((op / 4).dense(), op.dense() / 4, scale)
    close((-op).dense(), -op.dense(), scale)
    close((op @ other.T).dense(), op.dense() @ other.dense().T, 20 * scale**2)


def test_scipy_takes_a_matrix(make):
    op = make(())
    linear = op.to_scipy()
    x = draw(18, op.shape[-1])
    close(linear @ x, op.dense() @ x, np.abs(op.dense()).sum(-1).max())
    close(linear.T @ (op @ x), op.dense().T @ (op.dense() @ x), np.abs(op.dense()).sum() ** 2)


def test_scipy_refuses_a_batch():
    with pytest.raises(ValueError, match="batch axes"):
        Dense(draw(0, 2, 3, 3)).to_scipy()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda op: op @ np.ones((N_K + 1, 2)), "cannot be applied"),
        (lambda op: op + Dense(np.ones((2, 2))), "cannot be added"),
        (lambda op: op @ Dense(np.ones((2, 2))), "cannot be multiplied"),
        (lambda op: op + Dense(np.ones((5, N_Q, N_K))), "do not broadcast"),
    ],
)
def test_misfits_are_named(act, message):
    with pytest.raises(ValueError, match=message):
        act(Dense(draw(0, 3, N_Q, N_K)))


def test_star_is_not_a_product():
    op = Dense(np.ones((2, 2)))
    with pytest.raises(TypeError, match="A @ B"):
        op * op
