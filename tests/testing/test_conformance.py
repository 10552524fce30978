"""The suite itself: honest methods pass, and every fault is rejected by the check that is meant to catch it."""

import warnings

import numpy as np
import pytest
from registry import ROWS
from testing import faulty_methods as faulty
from testing import honest_methods as honest

import nla_llm as nl
from nla_llm.operators import Dense
from nla_llm.testing import ConformanceError, check_method, check_names
from nla_llm.testing.checks.statistics import mean_is_one

FAULTS = {
    faulty.Zeros: "converges",
    faulty.Uniform: "converges",
    faulty.RandomKeys: "beats_random_keys",
    faulty.ZerosForAnotherTarget: "converges",
    faulty.SoftmaxForAnotherTarget: "converges",
    faulty.NoSignFix: "unbiased",
    faulty.NoSignFixConvergesOnly: "converges",
    faulty.UnnormalisedDirections: "unbiased",
    faulty.ZeroBlocks: "unbiased",
    faulty.PaddedBlock: "row_sums",
    faulty.Epsilon: "unbiased",
    faulty.EpsilonConvergesOnly: "error_falls",
    faulty.KeyMaximumPerRow: "unbiased",
    faulty.KeyMaximumPerRowConvergesOnly: "converges",
    faulty.LeakingMask: "causality",
    faulty.GlobalKeyMaximum: "causality",
    faulty.MaskedValuesOnly: "padding",
    faulty.IgnoredMask: "refusals",
    faulty.CoupledHeads: "independent_heads",
    faulty.EditedMask: "inputs_unchanged",
    faulty.RememberedDraw: "statelessness",
    faulty.HiddenRandomness: "without_rng",
    faulty.ForgottenScale: "unbiased",
    faulty.GaussianKernel: "unbiased",
    faulty.ScalesMultipliedOut: "sharp_logits",
    faulty.LostLastKeys: "permutation_equivariance",
    faulty.WrongAdjoint: "operator_laws",
    faulty.NotAnOperator: "returns_operator",
    faulty.NegativeEntries: "nonnegative",
    faulty.WrongCost: "cost",
    faulty.WrongTheory: "theory",
    faulty.PartialWrongTheory: "theory",
    faulty.PartialForgottenScale: "unbiased",
    faulty.RefusesSharpAttention: "beats_random_keys",
    faulty.ZeroUpdateThatConverges: "converges",
    faulty.ClampedValues: "converges",
    faulty.RankTooHigh: "rank",
    faulty.CoupledBatch: "independent_batch",
}
SEEN_BY_ONE_CHECK_ALONE = [
    faulty.RandomKeys,
    faulty.LeakingMask,
    faulty.HiddenRandomness,
    faulty.ScalesMultipliedOut,
    faulty.WrongAdjoint,
    faulty.WrongCost,
    faulty.WrongTheory,
    faulty.RankTooHigh,
]


def test_every_registered_method_has_a_row():
    assert {row.name for row in ROWS} == set(nl.methods())


def test_registered_method_passes(row):
    report = check_method(row.make(), expected_failures=row.expected_failures)
    assert report.passed
    declared_nothing = 10  # even a method without any declaration has this many checks
    assert report.checks_run > declared_nothing


@pytest.mark.parametrize(("method", "name"), FAULTS.items(), ids=lambda x: getattr(x, "__name__", x))
def test_fault_is_rejected_by_the_check_that_is_meant_to(method, name):
    with pytest.raises(ConformanceError) as raised:
        check_method(method())
    failed = {r.name for r in raised.value.report.failures}
    assert name in failed
    assert f"{name}: " in str(raised.value)


@pytest.mark.parametrize("method", SEEN_BY_ONE_CHECK_ALONE, ids=lambda x: x.__name__)
def test_no_other_check_raises_a_false_alarm(method):
    report = check_method(method(), raise_on_failure=False)
    assert {r.name for r in report.failures} == {FAULTS[method]}


@pytest.mark.parametrize(
    "method", [faulty.Faulty(), faulty.ConvergesOnly(), faulty.FaultyUpdate()], ids=lambda x: type(x).__name__
)
@pytest.mark.parametrize("seed", range(3))
def test_the_honest_base_of_the_faults_passes_for_every_seed(method, seed):
    assert check_method(method, rng=seed).passed


@pytest.mark.parametrize(
    "method",
    [honest.TopKeys(), honest.Neighbours(), honest.ExactAtEveryBudget(), honest.TaylorPolynomial()],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.parametrize("seed", range(3))
def test_honest_methods_of_other_kinds_pass(method, seed):
    report = check_method(method, rng=seed)
    assert {"passed"} == {report[name].status for name in ("converges", "error_falls", "beats_random_keys")}


@pytest.mark.parametrize(
    ("method", "status", "sentence"),
    [
        (faulty.PromisedError(1.0, "closed form"), "passed", "error against"),
        (faulty.PromisedError(1.01, "closed form"), "failed", "error against"),
        (faulty.PromisedError(0.99, "closed form"), "failed", "error against"),
        (faulty.PromisedError(1.01, "bound"), "passed", "error against"),
        (faulty.PromisedError(0.99, "bound"), "failed", "error against"),
        (faulty.PromisedError(0.5, "floor"), "passed", ""),
        (faulty.PromisedError(1.1, "floor"), "failed", "error against"),
        (faulty.PromisedError(1.0, "first order"), "skipped", "promises nothing that a few draws can test"),
    ],
    ids=str,
)
def test_promised_error_is_tested_as_what_it_is(method, status, sentence):
    result = check_method(method, raise_on_failure=False)["theory"]
    assert result.status == status
    assert sentence in result.reason


def test_mean_is_one_finds_a_shift_and_nothing_else():
    noise = np.random.default_rng(0).standard_normal((500, 20))
    assert mean_is_one(1 + noise, what="x").holds
    noise[:, 7] += 0.4
    assert not mean_is_one(1 + noise, what="x").holds
    assert not mean_is_one(1 + np.nan * noise, what="x").holds
    assert mean_is_one(0.5 + 1e-3 * noise, what="x", one_sided=True).holds


def test_method_without_declarations_is_told_so():
    report = check_method(honest.undeclared)
    assert report.passed
    assert report.checks_run == 20
    for name in ("converges", "unbiased", "cost", "theory", "row_sums", "refusals"):
        assert report[name].status == "skipped"
        assert "not declared" in report[name].reason


def test_undeclared_method_must_honour_the_structure_that_it_accepts():
    def careless(problem, rng=None):
        return Dense(nl.AttentionProblem(problem.q, problem.k).exact(problem.q.dtype).dense())

    report = check_method(careless, raise_on_failure=False)
    assert {"causality", "padding", "window", "bias"} <= {r.name for r in report.failures}


def test_expected_failure_is_reported_with_its_reason():
    report = check_method(faulty.LeakingMask(), expected_failures={"causality": "the mask is one too wide"})
    assert report.passed
    assert report["causality"].status == "expected failure"
    assert "one too wide" in report["causality"].reason
    assert "1 failed as expected" in str(report)


def test_expected_failure_that_matches_nothing_warns():
    with pytest.warns(UserWarning, match="'casuality', which is no check"):
        check_method(nl.method("uniform"), expected_failures={"casuality": "mistyped"})


def test_expected_failure_that_passes_warns():
    with pytest.warns(UserWarning, match="causality was expected to fail .* but passed"):
        check_method(nl.method("uniform"), expected_failures={"causality": "old"})


def test_report_counts_and_lists_every_check():
    report = check_method(nl.method("uniform"))
    assert tuple(r.name for r in report.results) == check_names("attention")
    assert report.checks_run + len(report.skipped) == len(report.results)
    assert str(report).startswith(f"uniform(): {report.checks_run} checks ran")
    assert all(r.law.endswith(".") for r in report.results)
    assert all(r.reason for r in report.skipped)
    with pytest.raises(KeyError, match="no check is called 'nothing'"):
        report["nothing"]


def test_kinds_of_problems_have_names():
    assert set(check_names("update")) & set(check_names("attention")) >= {"returns_operator", "cost", "theory"}
    with pytest.raises(ValueError, match="problem must be one of attention, update, got 'weights'"):
        check_names("weights")


def test_report_as_html_escapes_and_counts():
    report = check_method(faulty.NotAnOperator(), raise_on_failure=False)
    html = report._repr_html_()
    assert html.count("<tr>") == len(report.results) + 1
    assert "1 checks ran, 0 passed, 1 failed" in html


def test_report_with_no_check_run_has_not_passed():
    assert not nl.testing.Report("nothing", ()).passed


def test_checks_run_on_the_problems_of_the_caller():
    seen = []

    def spy(problem, rng=None):
        seen.append(problem.q.shape)
        return problem.exact(problem.q.dtype)

    q = np.random.default_rng(0).standard_normal((3, 11, 5))
    assert check_method(spy, problems=[nl.AttentionProblem(q, q)]).passed
    assert (3, 11, 5) in seen
    assert (5, 1) not in [s[-2:] for s in seen]  # the built-in one with d = 1


def declaring(properties):
    def careless(problem, rng=None):
        raise AssertionError

    careless.properties = properties
    return careless


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"method": 3}, TypeError, "method must be callable"),
        ({"method": faulty.Faulty}, TypeError, "pass an instance"),
        ({"method": honest.undeclared, "rng": None}, TypeError, "rng must be a whole number"),
        ({"method": honest.undeclared, "rng": True}, TypeError, "rng must be a whole number"),
        ({"method": honest.undeclared, "problems": []}, ValueError, "problems is empty"),
        ({"method": honest.undeclared, "problems": [3]}, TypeError, "problems must be attention or update problems"),
        ({"method": declaring({"row_stochastic": True})}, TypeError, "properties must be nla_llm.Properties, got dict"),
        ({"method": declaring(nl.Properties(problem="weights"))}, ValueError, "'attention' or 'update', got 'weights'"),
        ({"method": declaring(nl.Properties(supports=frozenset({"mask"})))}, ValueError, "supports names .'mask'."),
        ({"method": declaring(nl.Properties(budget="m"))}, ValueError, "budget names 'm', but the method has no such"),
    ],
)
def test_bad_arguments_get_a_sentence(arguments, error, sentence):
    method = arguments.pop("method")
    with pytest.raises(error, match=sentence):
        check_method(method, **arguments)


def test_the_suite_itself_is_deterministic_and_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, two = (check_method(nl.method("positive_features", m=8)) for _ in range(2))
    assert one == two
