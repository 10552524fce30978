"""Arithmetic that is watched: arrays that count the operations done on them."""

from nla_llm.arithmetic.counted import CountedArray, counted
from nla_llm.arithmetic.draws import CountingGenerator
from nla_llm.arithmetic.tally import CLASSES, Tally, tally, untallied

__all__ = ["CLASSES", "CountedArray", "CountingGenerator", "Tally", "counted", "tally", "untallied"]
