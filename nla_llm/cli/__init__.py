"""The command line: thin verbs over the package."""

from nla_llm.cli.app import main

__all__ = ["main"]
