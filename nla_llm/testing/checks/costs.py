"""The declared cost against the operations that are really done."""

from __future__ import annotations

from nla_llm.testing.subject import Check, Skip, Subject

__all__ = ["COSTS"]


def _cost_is_count(subject: Subject) -> None:
    if getattr(subject.method, "cost", None) is None:
        raise Skip("cost: not declared")
    from nla_llm.costs import count  # noqa: PLC0415 - SymPy loads with it

    for problem in subject.problems():
        method = subject.limited(problem)
        declared, counted = method.cost(problem).at(problem, method), count(method, problem, rng=subject.seed)
        for stage in ("prepare", "apply"):
            pairs = zip(getattr(declared, stage).items(), getattr(counted, stage).items(), strict=True)
            wrong = [f"{kind} {x} declared, {y} counted" for (kind, x), (_, y) in pairs if x != y]
            if wrong:
                shape = tuple(problem.exact().shape)
                structure = ", ".join(sorted(problem.structure)) or "plain"
                raise AssertionError(f"{stage} on a problem of shape {shape} ({structure}): {'; '.join(wrong)}")


COSTS = (Check("cost", "The formula equals the count of the operations really done, class by class.", _cost_is_count),)
