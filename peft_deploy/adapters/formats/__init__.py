"""How adapters lie on disk: one module for each format, read into one :class:`Adapter`.

Needs numpy only; must not import Paddle, nor the layers in ``adapters.lora``.
"""

from peft_deploy.adapters.formats.adapter import Adapter
from peft_deploy.adapters.formats.paddlenlp import read_adapter, write_adapter

__all__ = ["Adapter", "read_adapter", "write_adapter"]
