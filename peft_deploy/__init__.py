"""From a PaddlePaddle model fine-tuned with LoRA to a verified ONNX bundle."""

__version__ = "0.1.0"
