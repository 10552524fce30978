"""The strategies draw what they say, cover what they say, and refuse what would leave nothing to draw."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import find, given, settings

from nla_llm.testing import strategies

QUIET = settings(max_examples=300, database=None, derandomize=True, deadline=None)


@given(strategies.attention_problems(max_tokens=12))
def test_attention_problems_are_valid_and_within_bounds(problem):
    problem._check()  # every query sees a key, shapes fit
    assert 1 <= min(problem.n_q, problem.n_k) <= max(problem.n_q, problem.n_k) <= 12
    assert 1 <= problem.d <= 8
    assert problem.q.dtype == problem.k.dtype == problem.v.dtype
    dense = problem.exact().dense()
    assert abs(dense.sum(axis=-1) - 1).max() < 1e-12


WANTED = {
    "one token": lambda p: p.n_q == p.n_k == 1,
    "d = 1": lambda p: p.d == 1,
    "rectangular": lambda p: p.n_q < p.n_k,
    "odd": lambda p: p.n_k % 2 == 1 and p.n_k > 10,
    "grouped": lambda p: p.q.ndim == 4 and p.q.shape[1] > 1 == p.k.shape[1],
    "float32": lambda p: p.q.dtype == np.float32,
    "given scale": lambda p: p.scale != p.d**-0.5,
    "large logits": lambda p: np.std(p.scale * p.q @ np.swapaxes(p.k, -1, -2)) > 30,
    "zero logits": lambda p: not np.any(p.scale * p.q),
    "trailing mask": lambda p: p.key_mask is not None and p.n_k > 5 and _trailing(p.key_mask),
    "scattered mask": lambda p: p.key_mask is not None and not p.key_mask.all() and not _trailing(p.key_mask),
    "causal window": lambda p: p.structure >= {"causal", "window"},
    "hiding bias": lambda p: p.bias is not None and np.isinf(p.bias).any(),
    "all structures": lambda p: len(p.structure) == 4,
}


def _trailing(mask):
    return not mask.all() and bool(np.all(np.diff(mask.astype(int)) <= 0))


@pytest.mark.parametrize("wanted", WANTED)
def test_attention_problems_cover(wanted):
    find(strategies.attention_problems(), WANTED[wanted], settings=settings(QUIET, max_examples=3000))


def test_a_failure_shrinks_to_the_smallest_problem():
    found = find(strategies.attention_problems(), lambda p: p.n_k >= 7, settings=QUIET)
    assert (found.n_q, found.n_k, found.d, found.structure, found.batch_shape) == (1, 7, 1, frozenset(), ())


@given(
    strategies.attention_problems(structures=(), rectangular=False, batched=False, values=False, dtypes=("float32",))
)
def test_attention_problems_can_be_narrowed(problem):
    assert problem.structure == frozenset()
    assert problem.n_q == problem.n_k
    assert problem.batch_shape == ()
    assert problem.v is None
    assert problem.q.dtype == np.float32


@given(strategies.matrices_with_spectrum(max_condition=1e3))
def test_spectrum_is_the_prescribed_one(known):
    s = np.linalg.svd(known.matrix.astype(np.float64), compute_uv=False)
    tolerance = 50 * np.finfo(known.matrix.dtype).eps * known.singular_values[0]
    assert abs(s - known.singular_values).max() < tolerance
    assert 1 <= known.condition_number <= 1e3 * (1 + 1e-12)
    assert known.rank == min(known.matrix.shape)


@given(strategies.ill_conditioned())
def test_condition_number_is_large_and_known(known):
    assert 1e8 * (1 - 1e-9) <= known.condition_number <= 1e14 * (1 + 1e-9)
    smallest = np.linalg.svd(known.matrix, compute_uv=False)[-1]
    assert abs(smallest - known.singular_values[-1]) < 100 * np.finfo(np.float64).eps


@given(strategies.rank_deficient())
def test_rank_is_below_the_smaller_side_and_known(known):
    assert known.rank < min(known.matrix.shape)
    assert known.condition_number == float("inf")
    s = np.linalg.svd(known.matrix.astype(np.float64), compute_uv=False)
    assert int(np.sum(s > 1e-4)) == known.rank


@given(strategies.update_problems(max_side=9))
def test_update_problems_are_valid(problem):
    assert 1 <= min(problem.d_out, problem.d_in) <= max(problem.d_out, problem.d_in) <= 9
    assert np.isfinite(problem.delta).all()
    assert 0.9 < np.linalg.norm(problem.delta.reshape(-1, problem.d_out, problem.d_in)[0], 2) < 1.2


@pytest.mark.parametrize(
    "wanted", [lambda p: p.base is not None, lambda p: p.inputs is not None, lambda p: p.delta.ndim == 4]
)
def test_update_problems_cover(wanted):
    find(strategies.update_problems(), wanted, settings=QUIET)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: strategies.attention_problems(min_tokens=5, max_tokens=4), "min_tokens must be .* at most max_tokens"),
        (lambda: strategies.attention_problems(min_tokens=0), "min_tokens must be at least 1"),
        (lambda: strategies.attention_problems(max_d=0), "at most max_d"),
        (lambda: strategies.attention_problems(structures=("diagonal",)), "structures must be a collection"),
        (lambda: strategies.attention_problems(structures="causal"), "structures must be a collection"),
        (lambda: strategies.attention_problems(dtypes=()), "dtypes must be a sequence"),
        (lambda: strategies.attention_problems(logit_sizes=()), "logit_sizes must be a sequence"),
        (lambda: strategies.matrices_with_spectrum(max_condition=0.5), "at most max_condition"),
        (lambda: strategies.ill_conditioned(max_condition=1e17), "at most 1/"),
        (lambda: strategies.rank_deficient(min_side=1), "at most min_side"),
        (lambda: strategies.update_problems(min_side=3, max_side=2), "min_side must be"),
    ],
)
def test_arguments_that_leave_nothing_to_draw_are_refused_at_once(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_conformance_does_not_import_hypothesis():
    check = "import sys, nla_llm as nl; nl.testing.check_method(nl.method('uniform'))"
    code = f"{check}; sys.exit('hypothesis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603 - our own code
