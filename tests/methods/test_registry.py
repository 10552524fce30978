"""Methods are found by name; what is unknown, taken or unsupported is refused in a sentence."""

import sys
import types
from dataclasses import dataclass, replace
from inspect import signature

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.methods import Method, Properties, Unsupported, describe, properties_of, register, registry
from nla_llm.methods.registry import positive, registered, require, whole_number

ATTENTION = nl.AttentionProblem(np.ones((9, 2)), np.ones((9, 2)))
UPDATE = nl.UpdateProblem(np.eye(9))


@pytest.fixture
def fresh(monkeypatch):
    """A registry of its own, with no installed package in sight; the entry points of the test go into the list."""
    offered = []
    nl.methods()  # the families register themselves once, when they are imported
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    monkeypatch.setattr(registry, "_loaded", False)
    monkeypatch.setattr(registry, "entry_points", lambda *, group: offered if group == "nla_llm.methods" else [])
    return offered


class Entry:
    """What ``importlib.metadata`` hands out, as far as it is used."""

    def __init__(self, name, load):
        self.name, self.load = name, load


@dataclass(frozen=True)
class FromOutside:
    m: int = 2

    def __call__(self, problem, rng=None):
        return problem.exact()


def test_names_are_sorted_and_make_methods():
    names = nl.methods()
    assert list(names) == sorted(names)
    assert {"uniform", "elu_features", "positive_features", "optimal_rank", "truncated_svd"} <= set(names)
    for name in names:
        assert registered(name).name == name


def test_every_registered_method_is_final_and_frozen(row):
    method = row.make()
    assert isinstance(method, Method)
    assert getattr(type(method), "__final__", False)
    assert type(method).__dataclass_params__.frozen


def test_every_registered_method_shows_an_example(row):
    assert ">>>" in registered(row.name).__doc__


@pytest.mark.parametrize(
    ("name", "nearest"), [("postive_features", "positive_features"), ("Uniform", "uniform"), ("svd", None)]
)
def test_unknown_name(name, nearest):
    with pytest.raises(ValueError, match=f"unknown method '{name}'") as refusal:
        nl.method(name)
    assert ("did you mean" in str(refusal.value)) == (nearest is not None)
    assert nearest is None or repr(nearest) in str(refusal.value)


def test_unknown_option_names_the_nearest_and_lists_all():
    with pytest.raises(ValueError, match="no option 'direction'; did you mean 'directions'") as refusal:
        nl.method("positive_features", m=4, direction="iid")
    assert str(refusal.value).endswith("its options are m, directions, recentre, orthogonal")


@pytest.mark.parametrize("option", ["m", "chunk", "properties"])
def test_class_attributes_are_no_options(option):
    with pytest.raises(ValueError, match=f"elu_features has no option '{option}'; its options are none"):
        nl.method("elu_features", **{option: 3})


def test_missing_option():
    with pytest.raises(ValueError, match=r"positive_features: .*missing.*'m'; its options are m, "):
        nl.method("positive_features")


@pytest.mark.parametrize("value", [0, -3, 2.5, 4.0, True, "8", None])
@pytest.mark.parametrize("name", ["positive_features", "random_keys", "optimal_rank"])
def test_budget_must_be_a_whole_number(name, value):
    with pytest.raises(ValueError, match="m must be a whole number >= 1, got"):
        nl.method(name, m=value)


def test_whole_number_says_its_bound():
    whole_number("power", 0, at_least=0)
    with pytest.raises(ValueError, match="power must be a whole number >= 2, got 1"):
        whole_number("power", 1, at_least=2)


def test_positive_says_its_bounds_and_what_else_is_allowed():
    positive("delta", 1, at_most=1)
    for value in (0, -1.0, 1.5, float("nan"), True, "8", None, np.ones(2)):
        with pytest.raises(ValueError, match="delta must be a number > 0 and <= 1 or 'best', got"):
            positive("delta", value, at_most=1, other=" or 'best'")


def test_numbers_of_numpy_make_the_same_method(row):
    def of_numpy(value):
        return {bool: np.bool_, int: np.int64, float: np.float64}.get(type(value), lambda v: v)(value)

    options = {name: of_numpy(value) for name, value in row.options.items()}
    method = nl.method(row.name, **options)
    assert method == row.make()
    assert {type(value) for value in describe(method).values()} <= {str, int, float, bool, types.NoneType}


def test_switches_are_true_or_false(row):
    """The text "no" is true to Python: an option that was meant to be off would be on."""
    switches = [p.name for p in signature(registered(row.name)).parameters.values() if "bool" in str(p.annotation)]
    for name in switches:
        for value in ("no", 0, 1.0, None):
            with pytest.raises(ValueError, match=f"{name} must be True or False, got {value!r}"):
                nl.method(row.name, **{**row.options, name: value})


def test_words_are_from_a_list(row):
    words = [p.name for p in signature(registered(row.name)).parameters.values() if isinstance(p.default, str)]
    for name in words:
        for value in ("nonsense", ["nonsense"], None, np.ones(2)):
            with pytest.raises(ValueError, match=f"{name} must be .*, got "):
                nl.method(row.name, **{o: v for o, v in row.options.items() if o != "orthogonal"} | {name: value})


def test_describe_is_enough_to_make_the_method_again(row):
    method = row.make()
    described = describe(method)
    assert nl.method(described.pop("method"), **described) == method
    assert all(isinstance(value, str | int | float | bool | None) for value in described.values())


def test_replace_keeps_the_other_options():
    method = nl.method("positive_features", m=4, orthogonal=True)
    assert replace(method, m=8) == nl.method("positive_features", m=8, directions="orthogonal")
    recentred = replace(method, recentre=True)
    assert "causal" not in recentred.properties.supports
    assert "causal" in replace(recentred, recentre=False).properties.supports


def test_describe_a_method_that_is_no_dataclass():
    def uniform(problem, rng=None):
        return problem.exact()

    assert describe(uniform) == {"method": "function"}
    assert properties_of(uniform) == Properties(row_stochastic=False, permutation_equivariant=False)


def test_registering_a_taken_name_is_refused(fresh):
    with pytest.raises(ValueError, match=r"'uniform' is taken by nla_llm\.methods\.attention\.yardsticks\.Uniform"):
        register("uniform")(FromOutside)
    assert registered("uniform").__name__ == "Uniform"


def test_a_class_of_the_same_name_from_another_module_is_another_class(fresh):
    impostor = type("Uniform", (), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match="'uniform' is taken"):
        register("uniform")(impostor)


def test_registering_a_class_again_is_harmless(fresh):
    assert register("mine")(register("mine")(FromOutside)) is FromOutside
    assert nl.method("mine", m=3).m == 3


def test_methods_of_other_packages_are_found(fresh):
    fresh.append(Entry("theirs", lambda: FromOutside))
    assert "theirs" in nl.methods()
    assert describe(nl.method("theirs")) == {"method": "theirs", "m": 2}


def test_an_entry_point_may_be_a_module_that_registers_its_methods(fresh):
    def load():
        register("registered_on_import")(FromOutside)
        return types.ModuleType("theirs")

    fresh.append(Entry("theirs", load))
    assert "registered_on_import" in nl.methods()
    assert "theirs" not in nl.methods()


def test_an_entry_point_that_is_no_class_is_refused(fresh):
    fresh.append(Entry("theirs", lambda: 3))
    with pytest.raises(TypeError, match=r"entry point 'theirs'.* int"):
        nl.methods()


def test_an_entry_point_that_fails_fails_every_time(fresh):
    fresh.append(Entry("broken", lambda: (_ for _ in ()).throw(ImportError("no such module"))))
    for _ in range(2):
        with pytest.raises(ImportError, match="no such module"):
            nl.methods()


def test_an_entry_point_may_use_the_registry_while_it_loads(fresh):
    def load():
        nl.method("uniform")
        return FromOutside

    fresh.append(Entry("theirs", load))
    assert "theirs" in nl.methods()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("elu_features", {"window": 2}, "elu_features has no form with window; .* supports causal, key_mask"),
        ("uniform", {"bias": np.zeros((4, 4)), "window": 2}, "uniform has no form with bias and window"),
        ("random_keys", {"bias": np.zeros((4, 4))}, "random_keys has no form with bias"),
        ("positive_features", {"window": 1}, "positive_features has no form with window"),
    ],
)
def test_unsupported_structure_is_named(method, options, message):
    options_of_method = {"m": 2} if "m" in registered(method).__dataclass_fields__ else {}
    problem = nl.AttentionProblem(np.eye(4), np.eye(4), **options)
    with pytest.raises(Unsupported, match=message):
        nl.method(method, **options_of_method)(problem, rng=0)


def test_problem_of_the_wrong_kind(row):
    method = row.make()
    wrong = UPDATE if properties_of(method).problem == "attention" else ATTENTION
    with pytest.raises(TypeError, match=f"{row.name} takes an .*Problem, got {type(wrong).__name__}"):
        method(wrong, rng=0)


def test_require_accepts_what_is_supported():
    require(nl.method("uniform"), nl.AttentionProblem(np.eye(4), np.eye(4), causal=True))


def test_randomness_is_an_argument(row):
    method = row.make()
    if not properties_of(method).deterministic:
        of_attention = properties_of(method).problem == "attention"
        problem = nl.AttentionProblem(np.ones((9, 2)), np.ones((9, 2))) if of_attention else nl.UpdateProblem(np.eye(9))
        with pytest.raises(TypeError, match="rng=0"):
            method(problem)


def test_importing_the_package_loads_no_method():
    assert "nla_llm.methods.registry" in sys.modules  # it is here now; a fresh interpreter must not have it
    import subprocess

    code = "import sys, nla_llm; sys.exit(any(m.startswith('nla_llm.methods.attention') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603 - our own code


@pytest.mark.parametrize("name", [3, None])
def test_a_name_that_is_no_text_is_unknown(name):
    with pytest.raises(ValueError, match=f"unknown method {name}"):
        nl.method(name)


def test_whole_numbers_of_numpy_are_whole_numbers():
    assert nl.method("random_keys", m=np.int64(3)) == nl.method("random_keys", m=3)
