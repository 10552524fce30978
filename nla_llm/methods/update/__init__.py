"""Methods for weight updates: engines of low rank, and what they return."""

from nla_llm.methods.update.result import LowRankUpdate, remaining_error

__all__ = ["LowRankUpdate", "remaining_error"]
