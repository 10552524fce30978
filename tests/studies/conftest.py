"""What the tests of the trainers share."""

import pytest


@pytest.fixture(scope="session")
def small_shape():
    """Arguments of a configuration with which a model trains in a moment."""
    return {
        "vocab_size": 300,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
    }
