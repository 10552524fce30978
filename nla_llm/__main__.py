"""``python -m nla_llm``: the same as the command ``nla-llm``."""

from nla_llm.cli import main

if __name__ == "__main__":
    main()
