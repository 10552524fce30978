"""Methods with one fault each, most of them found in published code."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from testing.honest_methods import softmax_where

from nla_llm.backend import generator
from nla_llm.methods import Properties
from nla_llm.methods.registry import require, whole_number
from nla_llm.operators import Dense, LowRank, RowNormalised, ZeroRowSumError
from nla_llm.theory import Theory

CONVERGES = Properties(
    family="faulty",
    budget="m",
    converges=True,
    deterministic=False,
    nonnegative=True,
    supports=frozenset({"causal", "key_mask"}),
)
UNBIASED = replace(CONVERGES, unbiased=True)


@dataclass(frozen=True)
class Faulty:
    """Positive random features as they should be; the subclasses break one thing each."""

    m: int = 16
    properties: ClassVar[Properties] = UNBIASED

    def __post_init__(self):
        whole_number("m", self.m)

    def __call__(self, problem, rng=None):
        require(self, problem)
        log_q, log_k = self.logs(problem, generator(rng))
        top_q, top_k = log_q.max(axis=-1, keepdims=True), self.key_scale(log_k)
        phi_q, phi_k = self.finish(np.exp(log_q - top_q)), self.finish(np.exp(log_k - top_k))
        kernel = phi_q @ np.swapaxes(phi_k, -1, -2) * self.visible(problem)
        carried = top_k if np.shape(top_k)[-2:] in {(), (1, 1)} else 0.0
        return RowNormalised(Dense(kernel), row_scale_log=(top_q + carried)[..., 0] - np.log(self.m))

    def logs(self, problem, rng):
        root = np.sqrt(self.scale(problem))
        x, y = root * problem.q, root * problem.k
        omega = self.directions(rng, problem.d)
        return (z @ omega.T - self.constant() * np.sum(z * z, axis=-1, keepdims=True) for z in (x, y))

    def scale(self, problem):
        return problem.scale

    def constant(self):
        return 0.5

    def directions(self, rng, d):
        return rng.standard_normal((self.m, d))

    def key_scale(self, log_k):
        return log_k.max(axis=(-2, -1), keepdims=True)

    def finish(self, features):
        return features

    def visible(self, problem):
        visible = np.ones((problem.n_q, problem.n_k), dtype=bool)
        if problem.causal:
            visible = np.tril(visible)
        if problem.key_mask is not None:
            visible = visible & problem.key_mask[..., None, :]
        return visible


class ConvergesOnly(Faulty):
    """The same without a claim about the mean, which is all that many published methods say."""

    properties = CONVERGES


class Zeros(Faulty):
    properties = replace(CONVERGES, row_stochastic=False)

    def __call__(self, problem, rng=None):
        require(self, problem)
        return Dense(np.zeros(problem.exact().shape, dtype=problem.q.dtype))


class Uniform(Faulty):
    properties = replace(CONVERGES, deterministic=True)

    def __call__(self, problem, rng=None):
        require(self, problem)
        weights = np.broadcast_to(self.visible(problem), problem.exact().shape).astype(problem.q.dtype)
        return Dense(weights / weights.sum(axis=-1, keepdims=True))


class ZerosForAnotherTarget(Zeros):
    """A target of its own is no excuse."""

    properties = replace(CONVERGES, row_stochastic=False, target="square kernel")

    @staticmethod
    def target(problem):
        return Dense((problem.q @ np.swapaxes(problem.k, -1, -2)) ** 2)


class SoftmaxForAnotherTarget(ConvergesOnly):
    """It converges, but not to what it says."""

    properties = replace(CONVERGES, target="square kernel")
    target = staticmethod(ZerosForAnotherTarget.target)


class RandomKeys(Faulty):
    properties = replace(CONVERGES, supports=frozenset(), permutation_equivariant=False)

    def __call__(self, problem, rng=None):
        require(self, problem)
        drawn = generator(rng).permutation(problem.n_k)[: self.m]
        logits = problem.scale * problem.q @ np.swapaxes(problem.k, -1, -2)
        keep = np.isin(np.arange(problem.n_k), drawn)
        return Dense(softmax_where(logits, keep))


class NoSignFix(Faulty):
    """Orthogonal directions straight from the QR factorisation: not Haar."""

    def directions(self, rng, d):
        blocks = -(-self.m // d)
        q = np.linalg.qr(rng.standard_normal((blocks, d, d)))[0].reshape(-1, d)[: self.m]
        return q * np.sqrt(rng.chisquare(d, size=(self.m, 1)))


class UnnormalisedDirections(Faulty):
    """Directions too long by the square root of d, as rows of a Hadamard matrix that was not scaled."""

    def directions(self, rng, d):
        return np.sqrt(d) * super().directions(rng, d)


class ZeroBlocks(Faulty):
    """Blocks of directions beyond 2d were never filled."""

    def directions(self, rng, d):
        return super().directions(rng, d) * (np.arange(self.m) < 2 * d)[:, None]


class PaddedBlock(Faulty):
    """Zero keys that fill up the last block of eight count in the denominator."""

    def __call__(self, problem, rng=None):
        op = super().__call__(problem, rng)
        missing = -problem.n_k % 8
        return Dense(op.dense() * (problem.n_k / (problem.n_k + missing))) if problem.n_k > 8 else op


class Epsilon(Faulty):
    def finish(self, features):
        return features + 1e-4


class KeyMaximumPerRow(Faulty):
    def key_scale(self, log_k):
        return log_k.max(axis=-1, keepdims=True)


class LeakingMask(Faulty):
    """A query sees one key too many."""

    def visible(self, problem):
        if not problem.causal:
            return super().visible(problem)
        leaking = np.tril(np.ones((problem.n_q, problem.n_k), dtype=bool), 1)
        return leaking if problem.key_mask is None else leaking & problem.key_mask[..., None, :]


class GlobalKeyMaximum(Epsilon):
    """A maximum over all keys, with the epsilon that usually comes with it: earlier rows see the last key."""

    properties = replace(CONVERGES, supports=frozenset({"causal"}))


class EpsilonConvergesOnly(Epsilon):
    properties = CONVERGES


class NoSignFixConvergesOnly(NoSignFix):
    properties = CONVERGES


class KeyMaximumPerRowConvergesOnly(Faulty):
    properties = CONVERGES

    def key_scale(self, log_k):
        return log_k.max(axis=-1, keepdims=True)


class HiddenRandomness(Faulty):
    """Draws from the clock where no seed is given."""

    def __call__(self, problem, rng=None):
        return super().__call__(problem, np.random.default_rng(rng))


class ForgottenScale(Faulty):
    def scale(self, problem):
        return 1.0


class GaussianKernel(Faulty):
    def constant(self):
        return 1.0


class MaskedValuesOnly(Faulty):
    """Hidden keys stay in the denominator."""

    properties = replace(UNBIASED, supports=frozenset({"key_mask"}))

    def __call__(self, problem, rng=None):
        require(self, problem)
        full = super().__call__(problem._with(key_mask=None), rng)
        return full if problem.key_mask is None else Dense(full.dense() * problem.key_mask[..., None, :])


class IgnoredMask(Faulty):
    """Takes whatever comes and attends to all keys."""

    properties = replace(UNBIASED, supports=frozenset())

    def __call__(self, problem, rng=None):
        return super().__call__(problem._with(causal=False, window=None, key_mask=None, bias=None), rng)

    def visible(self, problem):
        return np.ones((problem.n_q, problem.n_k), dtype=bool)


class CoupledHeads(Faulty):
    """A regulariser from the largest norm over batch and heads."""

    def logs(self, problem, rng):
        log_q, log_k = super().logs(problem, rng)
        return log_q, log_k - 0.1 * np.abs(problem.k)[..., :1] * np.abs(problem.k).max()


class EditedMask(Faulty):
    def __call__(self, problem, rng=None):
        op = super().__call__(problem, rng)
        if problem.key_mask is not None:
            problem.key_mask[..., -1] = False
        return op


class RememberedDraw(Faulty):
    """Directions are drawn again at every call, whatever the seed."""

    calls: ClassVar[list] = []

    def directions(self, rng, d):
        self.calls.append(d)
        return np.random.default_rng(len(self.calls)).standard_normal((self.m, d))


class ScalesMultipliedOut(Faulty):
    """Trigonometric features with exp(|x|²/2) multiplied out instead of carried as a logarithm."""

    properties = replace(UNBIASED, nonnegative=False, supports=frozenset())

    def __call__(self, problem, rng=None):
        require(self, problem)
        root = np.sqrt(problem.q.dtype.type(self.scale(problem)))
        omega = self.directions(generator(rng), problem.d).astype(problem.q.dtype)
        phi_q, phi_k = (self.trigonometric(root * z, omega) for z in (problem.q, problem.k))
        return RowNormalised(Dense(phi_q @ np.swapaxes(phi_k, -1, -2)))

    def trigonometric(self, x, omega):
        waves = np.concatenate([np.cos(x @ omega.T), np.sin(x @ omega.T)], axis=-1) / x.dtype.type(self.m) ** 0.5
        return np.exp(0.5 * np.sum(x * x, axis=-1, keepdims=True)) * waves


class LostLastKeys(Faulty):
    """Whole blocks of eight keys only: the rest is silently lost."""

    def visible(self, problem):
        visible = super().visible(problem)
        whole = problem.n_k - problem.n_k % 8
        return visible & (np.arange(problem.n_k) < whole) if problem.n_k > 8 else visible


class WrongAdjoint(Faulty):
    def __call__(self, problem, rng=None):
        op = super().__call__(problem, rng)
        op.apply_transpose = lambda y: np.swapaxes(op.dense(), -1, -2) @ y * 2.0
        return op


class NotAnOperator(Faulty):
    def __call__(self, problem, rng=None):
        return super().__call__(problem, rng).dense()


class NegativeEntries(Faulty):
    def __call__(self, problem, rng=None):
        dense = super().__call__(problem, rng).dense()
        return Dense(2.0 * dense - np.swapaxes(dense, -1, -2)) if problem.n_q == problem.n_k else Dense(dense)


class WrongCost(Faulty):
    def __call__(self, problem, rng=None):
        from nla_llm.methods import method

        return method("positive_features", m=self.m)(problem, rng=rng)

    def cost(self, problem):
        from nla_llm import costs
        from nla_llm.methods import method

        return method("positive_features", m=self.m).cost(problem) + costs.Cost(apply=costs.Operations(madd=1))


class WrongTheory(WrongCost):
    """The variance of twice as many directions."""

    cost = None

    def theory(self, problem):
        from nla_llm.methods import method

        return method("positive_features", m=2 * self.m).theory(problem)


class PartialWrongTheory(WrongTheory):
    """The same from a method that may refuse some data, which is checked on other tokens."""

    properties = replace(WrongTheory.properties, partial=True)


class PartialForgottenScale(ForgottenScale):
    """A method that may refuse some data is held to its mean too."""

    properties = replace(ForgottenScale.properties, partial=True)


class RefusesSharpAttention(RandomKeys):
    """A refusal counts as no success: where it is not refused, this one is no better than random keys."""

    properties = replace(RandomKeys.properties, partial=True)

    def __call__(self, problem, rng=None):
        if problem.scale == 1.0 and problem.d > 1:
            raise ZeroRowSumError("no key shares a feature with these queries")
        return super().__call__(problem, rng)


# -- updates -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FaultyUpdate:
    rank: int = 4
    properties: ClassVar[Properties] = Properties(
        problem="update", target="update", budget="rank", converges=True, row_stochastic=False
    )

    def __post_init__(self):
        whole_number("rank", self.rank)

    def __call__(self, problem, rng=None):
        u, s, vt = np.linalg.svd(problem.delta, full_matrices=False)
        r = self.used_rank()
        return LowRank(u[..., :r] * self.shrink(s[..., None, :r]), np.swapaxes(vt[..., :r, :], -1, -2))

    def used_rank(self):
        return self.rank

    def shrink(self, s):
        return s


class ZeroUpdateThatConverges(FaultyUpdate):
    def shrink(self, s):
        return 0.0 * s


class ClampedValues(FaultyUpdate):
    def shrink(self, s):
        return np.minimum(s, 0.5 * s.max())


class RankTooHigh(FaultyUpdate):
    def used_rank(self):
        return self.rank + 1


class CoupledBatch(FaultyUpdate):
    def shrink(self, s):
        return s * (1 - 1e-3 * s.max() / (1 + s.max()))


@dataclass(frozen=True)
class PromisedError:
    """The update shrunk by a tenth, with ``factor`` times its error as the promise."""

    factor: float
    kind: str
    properties: ClassVar[Properties] = Properties(problem="update", target="update", row_stochastic=False)

    def __call__(self, problem, rng=None):
        return Dense(0.9 * problem.delta)

    def theory(self, problem):
        norm = np.linalg.norm(problem.delta, axis=(-2, -1))
        shape = problem.delta.shape
        return Theory("a tenth", self.kind, "VE", "derived", shape, error_norm=lambda _: self.factor * 0.1 * norm)
