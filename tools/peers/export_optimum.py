"""python -m peers.export_optimum MODEL FOLDER: what optimum makes of a checkpoint. Runs in the peers' environment."""

from __future__ import annotations

import sys

from optimum.onnxruntime import ORTModelForCausalLM


def main() -> None:
    """The command line."""
    model = ORTModelForCausalLM.from_pretrained(sys.argv[1], export=True, use_cache=True)
    model.save_pretrained(sys.argv[2])


if __name__ == "__main__":
    main()
