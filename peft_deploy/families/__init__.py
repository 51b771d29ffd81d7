"""What differs between model families, as data and a few hooks.

The only package in which a family's name appears. Everything but the stand-ins works without Paddle; imports
only the modules above it (errors, signature, config).
"""

# Each of these registers itself.
from peft_deploy.families import bert as bert
from peft_deploy.families import bloom as bloom
from peft_deploy.families import chatglm_v2 as chatglm_v2
from peft_deploy.families import ernie as ernie
from peft_deploy.families import gemma as gemma
from peft_deploy.families import gpt as gpt
from peft_deploy.families import llama as llama
from peft_deploy.families import mistral as mistral
from peft_deploy.families import opt as opt
from peft_deploy.families import qwen as qwen
from peft_deploy.families import qwen2 as qwen2
from peft_deploy.families import roberta as roberta
from peft_deploy.families import rw as rw
from peft_deploy.families import t5 as t5
from peft_deploy.families.encoder import EncoderFamily
from peft_deploy.families.encoder_decoder import EncoderDecoderFamily
from peft_deploy.families.family import DecoderFamily, Family, ModelDims
from peft_deploy.families.names import MappedName, NameMap, NameRule
from peft_deploy.families.packing import PackedLinear, PackRule, find_packed
from peft_deploy.families.parallel import ParallelRule, parallel_axes
from peft_deploy.families.past import (
    PastDims,
    PastRule,
    find_past_rule,
    known_past_rules,
    past_dims,
    past_rule_of,
)
from peft_deploy.families.pooling import Pooling
from peft_deploy.families.registry import find_family, known_architectures, register
from peft_deploy.families.unread import describe_unread, unread_entries

__all__ = [
    "DecoderFamily",
    "EncoderDecoderFamily",
    "EncoderFamily",
    "Family",
    "MappedName",
    "ModelDims",
    "NameMap",
    "NameRule",
    "PackRule",
    "PackedLinear",
    "ParallelRule",
    "PastDims",
    "PastRule",
    "Pooling",
    "describe_unread",
    "find_family",
    "find_packed",
    "find_past_rule",
    "known_architectures",
    "known_past_rules",
    "parallel_axes",
    "past_dims",
    "past_rule_of",
    "register",
    "unread_entries",
]
