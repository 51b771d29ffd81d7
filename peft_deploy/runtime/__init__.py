"""Runs a bundle: ONNX Runtime and Paddle Inference behind one interface, sampling, generation with the cache.

Needs numpy and, once a model is opened, onnxruntime, or Paddle for a bundle in Paddle's own format. Must not import
Paddle before, nor anything that does; the modules above it that touch Paddle are adapters, training and trace.
"""

from __future__ import annotations

from peft_deploy.runtime.caching import ArrayCaching, Cache, CachingRunner, caching, initial_cache
from peft_deploy.runtime.encoder_decoder import EncoderDecoderRunner
from peft_deploy.runtime.external_data import check_external_data
from peft_deploy.runtime.feeds import check_feeds
from peft_deploy.runtime.generation import (
    Generation,
    GenerationOptions,
    GenerationRun,
    NewToken,
    generate,
)
from peft_deploy.runtime.loaded import LoadedBundle
from peft_deploy.runtime.loading import load_bundle
from peft_deploy.runtime.onnx_runner import OnnxRunner
from peft_deploy.runtime.opening import open_encoder, open_runner
from peft_deploy.runtime.paddle_runner import PaddleRunner
from peft_deploy.runtime.reading import Prediction, read_texts
from peft_deploy.runtime.runner import Runner
from peft_deploy.runtime.sampling import Sampling, choose
from peft_deploy.runtime.session import Session
from peft_deploy.runtime.text_generation import TextPiece, TextRun, encode_prompts

__all__ = [
    "ArrayCaching",
    "Cache",
    "CachingRunner",
    "EncoderDecoderRunner",
    "Generation",
    "GenerationOptions",
    "GenerationRun",
    "LoadedBundle",
    "NewToken",
    "OnnxRunner",
    "PaddleRunner",
    "Prediction",
    "Runner",
    "Sampling",
    "Session",
    "TextPiece",
    "TextRun",
    "caching",
    "check_external_data",
    "check_feeds",
    "choose",
    "encode_prompts",
    "generate",
    "initial_cache",
    "load_bundle",
    "open_encoder",
    "open_runner",
    "read_texts",
]
