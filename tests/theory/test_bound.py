"""The object in which a method states its promise."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

import nla_llm.theory
from nla_llm.theory import Theory, kernel_theory
from nla_llm.theory.yardsticks import eckart_young_theory


def promise(**fields):
    return Theory(**({"name": "x", "kind": "closed form", "status": "VE", "source": "s", "shape": (2, 6, 3)} | fields))


def test_rows_come_in_blocks_and_to_the_end():
    full = np.arange(36.0).reshape(2, 6, 3)
    theory = promise(log_variance_rows=lambda i, j: full[:, i:j], mean_rows=lambda i, j: np.ones((2, j - i, 3)))
    np.testing.assert_array_equal(theory.log_relative_variance(), full)
    np.testing.assert_array_equal(theory.log_relative_variance(4, 100), full[:, 4:])
    np.testing.assert_array_equal(theory.relative_variance(0, 1), np.exp(full[:, :1]))
    assert theory.covers == {"mean", "relative_variance"}
    assert theory.unbiased


def test_relative_variance_overflows_to_infinity_without_a_warning():
    theory = promise(shape=(1, 2), log_variance_rows=lambda i, j: np.array([[1e4, -np.inf]]))
    assert theory.relative_variance().tolist() == [[np.inf, 0.0]]


def test_bias_is_seen_in_the_last_block():
    def mean(i, j):
        block = np.ones((min(j, 300) - i, 1))
        block[-1] -= 1e-6 if j >= 300 else 0
        return block

    assert not promise(shape=(300, 1), mean_rows=mean).unbiased
    assert promise().unbiased is None


def test_errors_in_norms():
    assert promise(error_norm=lambda norm: np.full(2, len(norm))).error("spectral").tolist() == [8, 8]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: promise(kind="guess"), "kind must be one of closed form, bound, floor, first order"),
        (lambda: promise(status="OK"), "status must be one of VE, VB, NV"),
        (lambda: promise().mean(), "says nothing of the mean; it covers nothing"),
        (lambda: promise(mean_rows=np.ones).relative_variance(), "nothing of the relative_variance; it covers mean"),
        (lambda: promise().error("spectral"), "says nothing of the error"),
        (lambda: promise(mean_rows=np.ones).mean(6, 9), "0 <= start < stop <= 6"),
    ],
)
def test_bad_input(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_promises_travel_between_processes():
    q = np.ones((2, 3))
    sent = (kernel_theory(q, q, scale=1.0, features="positive", m=2), eckart_young_theory([2.0, 1.0], 1, (2, 2)))
    features, best = pickle.loads(pickle.dumps(sent))  # noqa: S301 - our own bytes
    np.testing.assert_array_equal(features.relative_variance(), sent[0].relative_variance())
    assert best.error("nuclear") == 1


def test_repr_is_one_line():
    assert repr(promise()) == "Theory('x', kind='closed form', status='VE', source='s', shape=(2, 6, 3))"


def test_names_load_lazily():
    for name in nla_llm.theory.__all__:
        assert hasattr(nla_llm.theory, name)
    assert set(nla_llm.theory.__all__) <= set(dir(nla_llm.theory))
    code = "import sys, nla_llm.theory; assert 'scipy' not in sys.modules, 'scipy was loaded'"
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603 - our own interpreter and code
