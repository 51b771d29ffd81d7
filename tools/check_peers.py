"""Holds bundles against Hugging Face's own libraries: transformers, PEFT and optimum.

Runs in the virtual environment that check_peers.sh makes; needs torch, and nothing of peft-deploy.

    check_peers.py make DIR       DIR/base is a checkpoint: writes DIR/lora and DIR/prefix, as PEFT saves them
    check_peers.py compare DIR    DIR/bundle, DIR/merged and DIR/prefixed against what they were made of
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

SEED = 5
PREFIX_TOKENS = 6
# Of the largest logit: two float32 computations in different orders.
CLOSE = 1e-4


def base_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=torch.float32, attn_implementation="eager"
    ).eval()


def make(folder: Path) -> None:
    generator = torch.Generator().manual_seed(SEED)

    def fill(parameters: Iterable[Any], spread: float) -> None:
        for parameter in parameters:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.data = spread * drawn / parameter.shape[-1] ** 0.5

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    ranks = {"q_proj": 2, "down_proj": 7}
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, rank_pattern=ranks, task_type="CAUSAL_LM"
    )
    lora = get_peft_model(base_of(folder), config)
    fill((p for n, p in lora.named_parameters() if "lora_" in n), 0.5)
    lora.save_pretrained(folder / "lora")

    config = PrefixTuningConfig(num_virtual_tokens=PREFIX_TOKENS, task_type="CAUSAL_LM")
    prefix = get_peft_model(base_of(folder), config)
    for parameter in prefix.prompt_encoder.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    prefix.save_pretrained(folder / "prefix")


def compare(folder: Path) -> bool:
    """Prints one line a comparison; False when one of them fails."""
    models = {
        "bundle": base_of(folder),
        "merged": PeftModel.from_pretrained(base_of(folder), folder / "lora").eval(),
        "prefixed": PeftModel.from_pretrained(base_of(folder), folder / "prefix").eval(),
    }
    titles = {"bundle": "transformers", "merged": "PEFT, LoRA", "prefixed": "PEFT, prefix"}
    tokenizer = Tokenizer.from_file(str(folder / "base" / "tokenizer.json"))
    passed = True

    def say(good: bool, what: str) -> None:
        nonlocal passed
        passed &= good
        print(f"{'ok    ' if good else 'FAILED'} {what}")

    for name, model in models.items():
        results = json.loads((folder / f"{name}.json").read_text("utf-8"))["results"]
        prompts = [tokenizer.encode(r["prompt"]).ids for r in results]
        steps = max(len(r["token_ids"]) for r in results)
        want = [greedy(model, prompt, steps) for prompt in prompts]
        say(
            [r["token_ids"] for r in results] == want,
            f"{titles[name]}: the {steps} greedy tokens of {len(want)} prompts are those of "
            f"peft-deploy generate, in one padded batch",
        )
        if name == "prefixed":
            continue  # optimum takes no adapters
        optimum = ORTModelForCausalLM.from_pretrained(folder / name)
        found = [greedy(optimum, prompt, steps) for prompt in prompts]
        say(found == want, f"optimum: loads {name} as it is, and generates the same tokens")
        gap, scale = logit_gap(model, folder / name, prompts)
        say(
            gap <= CLOSE * scale,
            f"{titles[name]}: logits differ from the bundle's by {gap:.1e}, where they reach {scale:.1f}",
        )
    base, tuned = (
        json.loads((folder / f"{n}.json").read_text("utf-8")) for n in ("bundle", "merged")
    )
    say(base["results"] != tuned["results"], "the adapter changes what the model says")
    return passed


def greedy(model: Any, prompt: list[int], steps: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
    )
    return [int(token) for token in out[0, len(prompt) :]]


def logit_gap(model: Any, bundle: Path, prompts: list[list[int]]) -> tuple[float, float]:
    """The largest difference over all prompts, and the largest logit."""
    session = ort.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])
    past = [i for i in session.get_inputs() if i.name.startswith("past_key_values")]
    gap = scale = 0.0
    for prompt in prompts:
        feeds: dict[str, Any] = {
            "input_ids": np.array([prompt]),
            "attention_mask": np.ones((1, len(prompt)), np.int64),
            "position_ids": np.arange(len(prompt))[None],
            **{i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in past},
        }
        with torch.no_grad():
            want = model(input_ids=torch.tensor([prompt])).logits.numpy()
        got = session.run(["logits"], feeds)[0]
        gap, scale = (
            max(gap, float(np.abs(got - want).max())),
            max(scale, float(np.abs(want).max())),
        )
    return gap, scale


def main() -> None:
    command, folder = sys.argv[1], Path(sys.argv[2])
    warnings.simplefilter("ignore")
    if command == "make":
        make(folder)
    elif not compare(folder):
        sys.exit(1)


if __name__ == "__main__":
    main()
