"""Kernel attention against dense definitions; its scales against a reference in the log domain."""

import numpy as np
import pytest
from methods.attention.kernels.written_out import EPS, close, dense_attention, draw, mask
from scipy.special import logsumexp

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.methods.attention.kernels.linear_attention import Features, _running_scale, kernel_attention
from nla_llm.operators import CausalLowRank, LowRank, RowNormalised

ELEMENTWISE = ["elu_features", "relu_features"]


@pytest.fixture(params=ELEMENTWISE)
def name(request):
    return request.param


# -- parallel = chunked = recurrent (B1), rank (B2) --------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"m": 7}, {"m": 7, "orthogonal": True}])
@pytest.mark.parametrize(
    "kind", ["elu_features", "relu_features", "positive_features", "hyperbolic_features", "trigonometric_features"]
)
def test_parallel_chunked_and_recurrent_forms_agree(kind, options):
    if kind in ELEMENTWISE:
        options = {}
    n, v = 150, draw(2, 150, 3)
    q, k = 0.3 * draw(0, n, 5), 0.3 * draw(1, n, 5)
    q[:, 0], k[:, 0] = 0.5 + abs(q[:, 0]), 0.5 + abs(k[:, 0])
    method = nl.method(kind, **options)
    full = method(nl.AttentionProblem(q, k), rng=0)
    parallel = np.exp(_row_log(full))[:, None] * full.op.dense()  # the kernel matrix, all pairs
    causal = method(nl.AttentionProblem(q, k, causal=True), rng=0)
    want = dense_attention(parallel, causal=True)
    amplification = (np.abs(np.tril(parallel)).sum(-1) / np.abs(np.tril(parallel).sum(-1))).max()
    close(causal @ v, want @ v, 1000 * amplification)
    assert amplification < 100  # the test is about agreement, not about cancellation
    close(_decode(causal.op, v), causal @ v, 1000 * amplification)


def _row_log(P):
    return np.zeros(P.shape[-2]) if P.row_scale_log is None else P.row_scale_log


def _decode(op, v):
    """Recurrent form: numerator and denominator from one state; on entering a chunk the state is rescaled."""
    columns = np.concatenate([v, np.ones((len(v), 1))], axis=1)
    state, out = np.zeros((op.rank, columns.shape[1])), []
    for i in range(len(v)):
        if op.decay is not None and i and i % op.chunk == 0:
            state = op.decay[i // op.chunk, :, None] * state
        state, y = CausalLowRank.step(state, op.left[i : i + 1], op.right[i : i + 1], columns[i : i + 1])
        out.append(y[:, :-1] / y[:, -1:])
    return np.concatenate(out)


@pytest.mark.parametrize(
    ("kind", "options", "rank"),
    [
        ("uniform", {}, 1),
        ("elu_features", {}, 5),
        ("relu_features", {}, 5),
        ("positive_features", {"m": 4}, 4),
        ("hyperbolic_features", {"m": 4}, 8),
        ("trigonometric_features", {"m": 4}, 8),
    ],
)
def test_rank_is_the_number_of_features(kind, options, rank):
    """B2: division of rows keeps the rank of the kernel matrix, and generic data reach the bound."""
    P = nl.method(kind, **options)(nl.AttentionProblem(abs(draw(0, 40, 5)), draw(1, 40, 5)), rng=0)
    values = np.linalg.svd(P.dense(), compute_uv=False)
    assert np.count_nonzero(values > 1000 * EPS * values[0]) == rank
    assert isinstance(P.op, LowRank)
    assert P.op.rank == rank


def test_causal_attention_is_not_of_low_rank():
    """The triangle of a low-rank product is invertible where its diagonal has no zero."""
    P = nl.method("elu_features")(nl.AttentionProblem(draw(0, 40, 5), draw(1, 40, 5), causal=True))
    assert np.linalg.matrix_rank(P.dense()) == 40


# -- invariances (B3): those that hold, and those that do not ----------------------------------------------------------


def difference(method, a, b, rng=0):
    return np.abs(method(nl.AttentionProblem(*a), rng=rng).dense() - method(nl.AttentionProblem(*b), rng=rng).dense())


def test_softmax_ignores_shifts_of_keys_and_a_change_of_basis():
    q, k, c, M = draw(0, 20, 4), draw(1, 20, 4), draw(2, 4), draw(3, 4, 4) + 3 * np.eye(4)

    def softmax(problem, rng=None):
        return problem.exact()

    assert difference(softmax, (q, k), (q, k + c)).max() < 1e3 * EPS
    assert difference(softmax, (q, k), (q @ M, k @ np.linalg.inv(M).T)).max() < 1e3 * EPS * np.linalg.cond(M)
    assert difference(softmax, (q, k), (q + c, k)).max() > 1e-2


@pytest.mark.parametrize("kind", ["elu_features", "positive_features", "hyperbolic_features", "trigonometric_features"])
def test_feature_maps_have_none_of_these(kind):
    q, k, c = 0.5 * draw(0, 20, 4), 0.5 * draw(1, 20, 4), draw(2, 4)
    method = nl.method(kind, **({} if kind == "elu_features" else {"m": 16}))
    assert difference(method, (q, k), (q, k + c)).max() > 1e-3
    assert difference(method, (q, k), (2 * q, k / 2)).max() > 1e-3


def test_relu_ignores_positive_scales_of_query_rows_and_of_all_keys():
    q, k = draw(0, 20, 4), draw(1, 20, 4)
    q[:, 0], k[:, 0] = abs(q[:, 0]), abs(k[:, 0])
    method, scales = nl.method("relu_features"), np.exp(draw(2, 20, 1))
    assert difference(method, (q, k), (scales * q, 3 * k)).max() < 100 * EPS
    assert difference(method, (q, k), (q, scales * k)).max() > 1e-2


@pytest.mark.parametrize("kind", ["elu_features", "relu_features", "uniform"])
def test_permutations_of_keys_and_queries(kind):
    q, k = abs(draw(0, 20, 4)), abs(draw(1, 15, 4))
    rows, columns = np.random.default_rng(2).permutation(20), np.random.default_rng(3).permutation(15)
    method = nl.method(kind)
    P = method(nl.AttentionProblem(q, k)).dense()
    close(method(nl.AttentionProblem(q[rows], k[columns])).dense(), P[rows][:, columns])


def test_grouped_queries_share_their_keys(name):
    q, k = abs(draw(0, 2, 3, 80, 4)), abs(draw(1, 2, 1, 80, 4))
    for causal in (False, True):
        problem = nl.AttentionProblem(q, k, causal=causal)
        P, v = nl.method(name)(problem), draw(2, 2, 1, 80, 5)
        assert P.shape == (2, 3, 80, 80)
        for index in np.ndindex(2, 3):
            alone = nl.method(name)(problem.head(index))
            close(P.dense()[index], alone.dense())
            close((P @ v)[index], alone @ v[index[0], 0])


# -- features whose logarithm is carried apart -------------------------------------------------------------------------


def log_reference(log_q, log_k, *, causal):
    """Rows of the normalised kernel from log φ, row by row, nothing multiplied out."""
    rows = []
    for i, a in enumerate(log_q):
        b = log_k[: i + 1] if causal else log_k
        log_entries = logsumexp(a + b, axis=1)
        row = np.zeros(len(log_k))
        row[: len(b)] = np.exp(log_entries - logsumexp(log_entries))
        rows.append(row)
    return np.array(rows)


def jumping_keys(n, m, size, seed=5):
    """Log-features of keys whose level jumps by up to ``size`` between neighbours."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, m)) + size * rng.uniform(-1, 1, (n, 1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [0, 20, 300, 3000])
def test_scales_against_the_log_domain(causal, size):
    n, m = 100, 6
    log_q, log_k = draw(4, n, m), jumping_keys(n, m, size)
    problem = nl.AttentionProblem(np.zeros((n, 1)), np.zeros((n, 1)), causal=causal)
    P = kernel_attention(problem, Features(log=log_q), Features(log=log_k), nonnegative=True)
    np.testing.assert_allclose(
        P.dense(), log_reference(log_q, log_k, causal=causal), rtol=0, atol=100 * EPS * (size + 1)
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_each_feature_may_have_its_own_scale(dtype):
    """Feature r grows while another falls: a scale common to all features would lose one of them."""
    n, m = 90, 3
    slope = 8.0 * np.arange(n)[:, None] * np.array([1.0, -1.0, 0.0])
    log_k = (draw(1, n, m) + slope).astype(dtype)
    log_q = (draw(0, n, m) - slope).astype(dtype)  # the queries compensate: all features matter in every row
    problem = nl.AttentionProblem(np.zeros((n, 1), dtype), np.zeros((n, 1), dtype), causal=True)
    P = kernel_attention(problem, Features(log=log_q), Features(log=log_k), nonnegative=True)
    want = log_reference(log_q.astype(np.float64), log_k.astype(np.float64), causal=True)
    np.testing.assert_allclose(P.dense(), want, rtol=0, atol=20 * np.finfo(dtype).eps * 8 * n)


@pytest.mark.parametrize(
    ("step", "chunk"),
    [(0.0, 64), (4.0, 64), (6.0, 32), (30.0, 8), (100.0, 4), (200.0, 2), (330.0, 1), (3000.0, 1)],
)
def test_chunks_are_halved_until_the_exponents_fit(step, chunk):
    """Keys that grow by ``step`` a token: c rows span (c − 1) step, which may be 0.45 log(max) = 319 in float64."""
    log_k = step * np.arange(128.0)[:, None] * np.ones(2)
    assert _running_scale(np.zeros_like(log_k), log_k, 64)[-1] == chunk


def test_halved_chunks_against_the_log_domain():
    n, m = 70, 4
    log_k = draw(1, n, m) + 400.0 * np.arange(n)[:, None]
    log_q = draw(0, n, m)
    problem = nl.AttentionProblem(np.zeros((n, 1)), np.zeros((n, 1)), causal=True)
    P = kernel_attention(problem, Features(log=log_q), Features(log=log_k), nonnegative=True)
    assert P.op.chunk == 1
    np.testing.assert_allclose(P.dense(), log_reference(log_q, log_k, causal=True), rtol=0, atol=EPS * 400 * n)


@pytest.mark.parametrize("chunk", [1, 5, 64, 1000])
def test_moving_the_scale_changes_no_product(chunk):
    """What the keys lose the queries and the decays get: log φ(q) + log φ(k) is the same for every pair."""
    log_q, log_k = draw(0, 23, 3), jumping_keys(23, 3, 10)
    moved_q, moved_k, decay, c = _running_scale(log_q, log_k, chunk)
    assert moved_k.max() <= 0
    assert decay.max() <= 1
    entered = np.cumsum(np.log(decay), axis=0)[np.arange(23) // c]  # decays met by a token of each chunk
    pairs = moved_q[:, None] + entered[:, None] + moved_k[None] - entered[None]
    want = log_q[:, None] + log_k[None]
    np.testing.assert_allclose(pairs, want, rtol=0, atol=1000 * EPS * np.abs(want).max())


@pytest.mark.parametrize("causal", [False, True])
def test_row_scale_is_the_common_factor_of_the_kernel(causal, xp):
    n, m = 20, 3
    log_q, log_k, amplitude = draw(0, n, m), draw(1, n, m), draw(2, n, m)
    problem = nl.AttentionProblem(xp.asarray(draw(0, n, 1)), xp.asarray(draw(1, n, 1)), causal=causal)
    queries = Features(xp.asarray(amplitude), xp.asarray(log_q))
    P = kernel_attention(problem, queries, Features(log=xp.asarray(log_k)), log_factor=0.7)
    want = np.exp(0.7) * (amplitude * np.exp(log_q)) @ np.exp(log_k).T
    kernel = np.exp(to_numpy(P.row_scale_log))[:, None] * to_numpy(P.op.dense())
    close(kernel, np.tril(want) if causal else want, 1000)
    assert isinstance(P, RowNormalised)


def test_features_hide_tokens():
    keep = np.array([True, False, True])
    hidden = Features(np.ones((3, 2)), np.zeros((3, 2))).hide(keep)
    assert hidden.amplitude.tolist() == [[1, 1], [0, 0], [1, 1]]
    assert hidden.log[1].tolist() == [-np.inf, -np.inf]
    assert hidden.times(np.exp(hidden.log)).tolist() == [[1, 1], [0, 0], [1, 1]]
    assert Features(log=np.zeros((3, 1))).hide(None).amplitude is None


@pytest.mark.parametrize("kind", ["elu_features", "relu_features", "positive_features"])
def test_masked_keys_are_as_good_as_absent(kind):
    """Whatever stands in a masked row: it enters neither numerator nor denominator."""
    q, k, keep = abs(draw(0, 90, 4)), abs(draw(1, 90, 4)), mask(90)
    method = nl.method(kind, **({"m": 8} if kind == "positive_features" else {}))
    garbage = np.where(keep[:, None], k, 50.0)
    for causal in (False, True):
        P = method(nl.AttentionProblem(q, garbage, key_mask=keep, causal=causal), rng=0).dense()
        assert not P[:, ~keep].any()
        if not causal:
            close(P[:, keep], method(nl.AttentionProblem(q, k[keep]), rng=0).dense(), 1000)


# -- parts of features -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amplitude", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_rows_and_columns_are_parts_of_the_logarithm(causal, masked, amplitude, xp):
    """The same kernel whether log + row + column is one array or three, two heads against one."""
    n, m = 150, 5
    log_q, log_k = draw(0, 2, n, m), draw(1, 1, n, m)
    row_q, row_k, column = 3 * draw(2, 2, n, 1), 3 * draw(3, 1, n, 1), draw(4, 2, 1, m)
    amplitude_q, amplitude_k = (abs(draw(s, 1, n, m)) if amplitude else None for s in (5, 6))
    q = draw(7, 2, n, 2)
    problem = nl.AttentionProblem(q, q, causal=causal, key_mask=mask(n) if masked else None)

    def attention(queries, keys):
        parts = [Features(*(None if a is None else xp.asarray(a) for a in part)) for part in (queries, keys)]
        P = kernel_attention(problem.map(xp.asarray), *parts, log_factor=0.5)
        return np.exp(to_numpy(P.row_scale_log))[..., None] * to_numpy(P.op.dense())

    one = attention((amplitude_q, log_q + row_q), (amplitude_k, log_k + row_k + column))
    three = attention((amplitude_q, log_q, row_q), (amplitude_k, log_k, row_k, column))
    kernel = np.exp(0.5 + log_q + row_q) * (1 if amplitude_q is None else amplitude_q)
    kernel = kernel @ np.swapaxes(np.exp(log_k + row_k + column) * (1 if amplitude_k is None else amplitude_k), -1, -2)
    want = kernel * problem.key_mask if masked else kernel
    want = np.tril(want) if causal else want
    np.testing.assert_allclose(one, want, rtol=1e4 * EPS, atol=0)
    np.testing.assert_allclose(three, want, rtol=1e4 * EPS, atol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_rows_beside_amplitudes_alone(causal):
    n, q = 150, draw(7, 2, 150, 2)
    amplitude_q, amplitude_k, row_q, row_k = (
        abs(draw(0, n, 3)), abs(draw(1, n, 3)), 400 * draw(2, n, 1), 400 * draw(3, n, 1)
    )  # fmt: skip
    problem = nl.AttentionProblem(q[0], q[0], causal=causal)
    P = kernel_attention(problem, Features(amplitude_q, row=row_q), Features(amplitude_k, row=row_k))
    log_kernel = np.log(amplitude_q @ amplitude_k.T) + row_k.T
    log_kernel = np.where(np.tri(n, dtype=bool) | (not causal), log_kernel, -np.inf)
    want = np.exp(log_kernel - logsumexp(log_kernel, axis=-1, keepdims=True))
    np.testing.assert_allclose(P.dense(), want, rtol=0, atol=1e4 * EPS)


@pytest.mark.parametrize("causal", [False, True])
def test_features_that_some_or_all_keys_lack(causal, xp):
    """A log of −inf is a zero: feature 0 no key has, feature 1 comes with key 100 of a chunk, the rest are common."""
    n, q = 150, draw(7, 150, 2)
    log_q, log_k = draw(0, n, 4), 300 * draw(1, n, 4) / 50
    log_k[:, 0], log_k[:100, 1], log_q[::2, 2] = -np.inf, -np.inf, -np.inf
    problem = nl.AttentionProblem(q, q, causal=causal).map(xp.asarray)
    P = kernel_attention(problem, Features(log=xp.asarray(log_q)), Features(log=xp.asarray(log_k)))
    want = dense_attention(np.exp(log_q) @ np.exp(log_k).T, causal=causal)
    np.testing.assert_allclose(to_numpy(P.dense()), want, rtol=0, atol=1e4 * EPS)
    assert not causal or P.op.chunk == 64


# -- underflow ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "expected"), [(np.float32, (0.01, 0.9)), (np.float64, (0.0, 1e-3))])
def test_underflow_is_reported_at_logits_of_scale_fifty(dtype, expected, masked, causal):
    n, m = 200, 64
    q, k = draw(0, 3, n, 16), draw(1, 3, n, 16)
    problem = nl.AttentionProblem(
        q.astype(dtype), k.astype(dtype), scale=12.5, causal=causal, key_mask=mask(n) if masked else None
    )
    assert 45 < np.std(problem.scale * q @ np.swapaxes(k, -1, -2)) < 55
    P = nl.method("positive_features", m=m)(problem, rng=0)
    assert np.isfinite(P.dense()).all()
    share = to_numpy(P.underflow_share)
    assert share.shape == (3,)
    visible = mask(n) if masked else np.ones(n, dtype=bool)
    zeros = np.sum(P.op.left == 0, axis=(-2, -1)) + np.sum(P.op.right[:, visible] == 0, axis=(-2, -1))
    np.testing.assert_allclose(share, zeros / ((n + visible.sum()) * m), rtol=1e-12)
    assert expected[0] <= share.min() <= share.max() <= expected[1]


def test_underflow_of_optimal_features_is_larger():
    """Their logarithms spread further: A|ω|² stands beside ω·x."""
    problem = nl.AttentionProblem(draw(0, 200, 16).astype(np.float32), draw(1, 200, 16).astype(np.float32), scale=12.5)
    positive, optimal = (nl.method(name, m=64)(problem, rng=0) for name in ("positive_features", "gerf_features"))
    assert positive.underflow_share < 0.2
    assert 0.5 < optimal.underflow_share < 0.95
    assert np.isfinite(optimal.dense()).all()


def test_only_exponentials_underflow(xp):
    """Features of ReLU that are zero, and sines of zero, are not lost; grouped queries share their keys."""
    q = np.abs(draw(0, 2, 3, 20, 4)) * (draw(1, 2, 3, 20, 4) > 0)
    q[..., 0] = 1
    problem = nl.AttentionProblem(q, q[:, :1]).map(xp.asarray)
    for method in (nl.method("relu_features"), nl.method("elu_features"), nl.method("trigonometric_features", m=3)):
        np.testing.assert_array_equal(to_numpy(method(problem, rng=0).underflow_share), np.zeros((2, 3)))
    assert nl.method("trigonometric_features", m=3)(problem, rng=0).underflow_share.shape == (2, 3)


@pytest.mark.parametrize("row", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_q", [(2,), (1,), ()])
def test_logs_are_overwritten_only_where_that_is_allowed(heads_q, causal, row, xp):
    """Also where the queries have fewer heads than the keys, so that their logs have no room for the result."""
    n, m = 300, 120  # large enough for threads
    log_q, log_k = draw(0, *heads_q, n, m), draw(1, 2, n, m)
    rows = [draw(s, *a.shape[:-1], 1) if row else None for s, a in ((2, log_q), (3, log_k))]
    problem = nl.AttentionProblem(draw(4, n, 2), draw(5, 2, n, 2), causal=causal).map(xp.asarray)

    def attention(overwrite):
        logs = [xp.asarray(a, copy=True) for a in (log_q, log_k)]
        parts = [Features(log=a, row=None if r is None else xp.asarray(r)) for a, r in zip(logs, rows, strict=True)]
        return logs, to_numpy(kernel_attention(problem, *parts, overwrite=overwrite).dense())

    kept, want = attention(False)
    np.testing.assert_array_equal(to_numpy(kept[0]), log_q)
    np.testing.assert_array_equal(to_numpy(kept[1]), log_k)
    np.testing.assert_array_equal(attention(True)[1], want)
