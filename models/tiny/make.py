"""Makes a small model of any family with random weights, and LoRA adapters for it.

Each ``NAME.json`` beside this file is the config.json of one model: a family, or a variant of one. The sizes are
awkward on purpose (odd numbers of heads, groups of heads, vocabularies that are no multiple of 8)::

    python models/tiny/make.py qwen2 DIR

The weights are large enough for attention to be far from uniform and for logits to differ by several units, so
that a tensor that is missing, transposed or swapped for another shows in the results. Needs Paddle, which knows the
parameters of every family.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from peft_deploy.families import NameMap

HERE = Path(__file__).resolve().parent
LAYOUTS = ("paddlenlp", "huggingface")
RANK = 3

Array = npt.NDArray[np.float32]


def known() -> list[str]:
    """The names of all models, sorted."""
    return sorted(path.stem for path in HERE.glob("*.json"))


def config_of(name: str, **entries: Any) -> dict[str, Any]:
    """A model's config.json, with some entries replaced."""
    config: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text("utf-8"))
    return {**config, **entries}


def make(
    folder: Path, name: str, *, layout: str = "paddlenlp", seed: int = 0, **entries: Any
) -> Path:
    """Writes a checkpoint in float32.

    Args:
        folder: where to; made when missing.
        name: one of :func:`known`.
        layout: ``paddlenlp`` (linear weights [in, out]) or ``huggingface`` ([out, in]).
        seed: decides the weights.
        **entries: replace entries of config.json.

    Returns:
        The folder.
    """
    from peft_deploy.base.dygraph import build_skeleton, unique_parameters
    from peft_deploy.families import find_family

    if layout not in LAYOUTS:
        raise ValueError(f"{layout!r} is none of {', '.join(LAYOUTS)}")
    config = config_of(name, **entries)
    family = find_family(config)
    shapes = {
        n: tuple(p.shape) for n, p in unique_parameters(build_skeleton(family, config)).items()
    }
    rng = np.random.default_rng(seed)
    tied = family.tied(config)
    tensors = {n: _draw(rng, n, shape) for n, shape in shapes.items() if n not in tied}
    if layout == "huggingface":
        tensors = _in_huggingface_layout(tensors, family.names(config))
        config = family.huggingface_config(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    kind = "pt" if layout == "huggingface" else "np"
    save_file(tensors, folder / "model.safetensors", {"format": kind})
    return folder


def _in_huggingface_layout(tensors: dict[str, Array], names: NameMap) -> dict[str, Array]:
    renamed = {}
    for name, array in tensors.items():
        mapped = names.to_huggingface(name)
        if mapped is None:
            raise ValueError(f"{name} has no name in Hugging Face's layout")
        renamed[mapped.name] = np.ascontiguousarray(array.T if mapped.transpose else array)
    return renamed


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    if name.endswith("bias"):
        return rng.normal(0, 0.3, shape).astype(np.float32)
    if len(shape) == 1:  # a norm's weight
        return rng.uniform(0.6, 1.4, shape).astype(np.float32)
    if "relative_attention_bias" in name:
        return rng.normal(0, 1, shape).astype(np.float32)
    if "embed" in name or name.endswith(("wte.weight", "lm_head.weight", "shared.weight")):
        return rng.normal(0, 2.5 / math.sqrt(shape[-1]), shape).astype(np.float32)
    return rng.normal(0, 1.5 / math.sqrt(shape[0]), shape).astype(np.float32)


def make_lora(
    folder: Path, base: Path, *, rank: int = RANK, seed: int = 7, spread: float = 0.5
) -> Path:
    """Writes an adapter in PaddleNLP's form, on every layer that its family adapts, A and B random.

    Args:
        folder: where to.
        base: the base model's folder.
        rank: R.
        seed: decides the values.
        spread: how large the adapter's part of a layer's output is against the layer's own.
    """
    import paddle

    from peft_deploy.adapters.lora import LoRAModel
    from peft_deploy.base import open_base
    from peft_deploy.base.dygraph import load_model
    from peft_deploy.config import LoRAConfig

    model = open_base(base)
    config = LoRAConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(model.family.lora_targets)
    )
    adapted = LoRAModel(load_model(model), config)
    rng = np.random.default_rng(seed)
    for name, parameter in adapted.named_parameters():
        if name.endswith(("lora_A", "lora_B")):
            scale = 1 / math.sqrt(parameter.shape[0]) * (spread / 2 if name.endswith("B") else 1)
            values = rng.normal(0, scale, parameter.shape).astype(np.float32)
            parameter.set_value(paddle.to_tensor(values))
    adapted.save_pretrained(folder)
    return folder


def make_prefix(folder: Path, base: Path, *, tokens: int = 5, seed: int = 9) -> Path:
    """Writes a prefix in PaddleNLP's form, its embedding and projection random.

    Args:
        folder: where to.
        base: the base model's folder, of a decoder.
        tokens: P.
        seed: decides the values.
    """
    import paddle

    from peft_deploy.adapters.prefix import PrefixModelForCausalLM
    from peft_deploy.base import open_base
    from peft_deploy.base.dygraph import load_model
    from peft_deploy.config import PrefixConfig

    config = PrefixConfig(num_prefix_tokens=tokens, prefix_projection=True)
    adapted = PrefixModelForCausalLM(load_model(open_base(base)), config)
    rng = np.random.default_rng(seed)
    for parameter in adapted.prefix_encoder.parameters():
        scale = 1.0 if len(parameter.shape) == 1 else 1.5 / math.sqrt(parameter.shape[0])
        values = rng.normal(0, scale, parameter.shape).astype(np.float32)
        parameter.set_value(paddle.to_tensor(values))
    adapted.save_pretrained(folder)
    return folder


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=known())
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", choices=LAYOUTS, default="paddlenlp")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora", type=Path, help="also write an adapter here")
    args = parser.parse_args()
    make(args.folder, args.name, layout=args.layout, seed=args.seed)
    if args.lora:
        make_lora(args.lora, args.folder, seed=args.seed)


if __name__ == "__main__":
    main()
