"""What holds for the configuration of any decoder, as published by others."""

from __future__ import annotations

from typing import Any

from peft_deploy.base.dygraph import build_skeleton, unique_parameters
from peft_deploy.families import find_family


def check_published(
    config: dict[str, Any], sizes: tuple[int, ...], arguments: dict[str, Any]
) -> None:
    """The family reads the sizes and gives PaddleNLP these arguments, and others, from what was published.

    Args:
        config: the config.json.
        sizes: layers, hidden size, heads, kv heads, head dim, vocabulary, positions.
        arguments: some of those for PaddleNLP's configuration.
    """
    family = find_family(config)
    dims = family.dims(config)
    assert (
        dims.num_layers,
        dims.hidden_size,
        dims.num_heads,
        dims.num_kv_heads,
        dims.head_dim,
        dims.vocab_size,
        dims.max_positions,
    ) == sizes
    assert arguments.items() <= family.paddle_arguments(config).items()
    # What goes into a bundle says the same in Hugging Face's words.
    written = family.huggingface_config(config)
    assert family.dims(written) == dims
    assert family.paddle_arguments(written) == family.paddle_arguments(config)
    assert written["eos_token_id"] == config["eos_token_id"]
    assert find_family(written) is family


def check_names(config: dict[str, Any]) -> None:
    """The family's names are those of the parameters that PaddleNLP's model has."""
    family = find_family(config)
    found = unique_parameters(build_skeleton(family, config)).keys() | family.tied(config).keys()
    assert family.names(config).parameters(family.dims(config).num_layers) == found
