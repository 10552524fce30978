"""What is approximated: attention problems, updates, a gallery of both, and real ones from language models."""

import lazy_loader

from nla_llm.problems.problem import AttentionProblem, UpdateProblem

_getattr, _dir, _all = lazy_loader.attach(
    __name__,
    submodules=["checkpoint", "embedded", "gallery", "llama"],
    submod_attrs={
        "checkpoint": ["Checkpoint", "CheckpointError", "open_safetensors"],
        "embedded": ["embedded_model", "heldout_tokens", "training_record"],
        "llama": ["LlamaConfig", "LlamaModel", "load_llama"],
    },
)
__getattr__ = _getattr
__all__ = ["AttentionProblem", "UpdateProblem", *_all]


def __dir__() -> list[str]:
    return [*_dir(), "AttentionProblem", "UpdateProblem"]
