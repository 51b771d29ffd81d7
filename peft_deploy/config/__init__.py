"""The options of adapters and jobs: validated dataclasses with a JSON form on disk, and the
matching of patterns.

Owns every option's name, default and check. Imports nothing but the error tree: neither Paddle nor
any other package of this distribution.
"""

from peft_deploy.config.errors import LoRAConfigError, LoRAConfigTypeError, PrefixConfigError
from peft_deploy.config.lora import LORA_CONFIG_NAME, LoRAConfig
from peft_deploy.config.matching import match_pattern, match_patterns
from peft_deploy.config.prefix import PREFIX_CONFIG_NAME, PrefixConfig

__all__ = [
    "LORA_CONFIG_NAME",
    "PREFIX_CONFIG_NAME",
    "LoRAConfig",
    "LoRAConfigError",
    "LoRAConfigTypeError",
    "PrefixConfig",
    "PrefixConfigError",
    "match_pattern",
    "match_patterns",
]
