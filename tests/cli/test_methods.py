"""Methods by their names on the command line, and the verb check."""

import pytest

from nla_llm.cli._methods import code_of, make, parse, parse_options

UNIFORM = """
import nla_llm as nl

class Mine:
    properties = nl.Properties(family="mine", target="mean", yardstick=True, nonnegative=True, shift_invariant=True)

    def __init__(self, m=1):
        self.m = m

    def __call__(self, problem, rng=None):
        nl.methods.require(self, problem)
        return nl.method("uniform")(problem)

instance = Mine()
"""
ZEROS = UNIFORM.replace("return nl.", "return 0.0 * nl.").replace("Mine", "Zeros")


def test_parse():
    assert parse("uniform") == ("uniform", {})
    assert parse("a.b:C") == ("a.b:C", {})
    assert parse("a.b:C:m=2,kind='x'") == ("a.b:C", {"m": 2, "kind": "x"})
    with pytest.raises(ValueError, match="twice"):
        parse_options(["m=1", "m=2"])


def test_budget_goes_to_the_field_that_buys_accuracy():
    assert make("random_keys", {}, budget=7).m == 7
    assert make("random_keys", {"m": 3}, budget=7).m == 3
    assert make("truncated_svd", {}, budget=7).rank == 7
    assert make("uniform", {}, budget=7) == make("uniform", {})


def test_code_of_somebody_elses_method_changes_with_its_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "mine_code.py"
    file.write_text(UNIFORM)
    method = make("mine_code:Mine", {})
    before = code_of(method)
    file.write_text(UNIFORM + "# changed\n")
    assert before != code_of(method)
    assert code_of(make("uniform", {})) is None


def test_check_passes_an_honest_method_and_fails_a_false_one(nla, tmp_path):
    (tmp_path / "mine_good.py").write_text(UNIFORM)
    (tmp_path / "mine_bad.py").write_text(ZEROS)
    good, bad = nla("check", "mine_good:instance"), nla("check", "mine_bad:Zeros")
    assert (good.code, bad.code) == (0, 1)
    assert "row" in bad.out


def test_an_instance_takes_no_options(nla, tmp_path):
    (tmp_path / "mine_made.py").write_text(UNIFORM)
    assert "takes no options" in nla("check", "mine_made:instance", "m=2").sentence
    assert "cannot be made" in nla("check", "mine_made:Mine", "k=2").sentence


@pytest.mark.parametrize("text", ["import sys; sys.exit(0)", "import nla_llm; nla_llm.no_such_thing"])
def test_a_module_that_ends_or_breaks_while_it_is_imported_is_named(nla, tmp_path, text):
    name = f"mine_ends_{len(text)}"
    (tmp_path / f"{name}.py").write_text(text)
    told = nla("check", f"{name}:Thing").sentence
    assert f"cannot import '{name}'" in told
