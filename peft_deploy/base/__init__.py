"""The base model: a folder with a config.json and weights, seen the same way whoever wrote it.

:func:`open_base` reads what the files say without Paddle; :mod:`peft_deploy.base.dygraph` builds the PaddleNLP
model from it, with weights or as a skeleton. Imports only the packages above it (families, weights).
"""

from peft_deploy.base.folder import BaseModel, open_base

__all__ = ["BaseModel", "open_base"]
