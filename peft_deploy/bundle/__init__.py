"""The folder that an export makes and the runtimes read.

Owns its layout, its manifest, and the configuration files of the runtimes that it is made for. Writes it whole or
not at all. Imports only the packages above it; needs neither Paddle nor a runtime.
"""

from peft_deploy.bundle.folder import BundleFolder
from peft_deploy.bundle.manifest import (
    ENCODER,
    FORMAT_VERSION,
    MANIFEST,
    MODEL,
    MODEL_DATA,
    PARAMS,
    PROGRAM,
    EncoderGraph,
    Manifest,
)
from peft_deploy.bundle.runtimes import genai_config, special_token_ids

__all__ = [
    "ENCODER",
    "FORMAT_VERSION",
    "MANIFEST",
    "MODEL",
    "MODEL_DATA",
    "PARAMS",
    "PROGRAM",
    "BundleFolder",
    "EncoderGraph",
    "Manifest",
    "genai_config",
    "special_token_ids",
]
