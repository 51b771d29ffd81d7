"""Whether a bundle computes what was trained: cases, limits, comparison, report.

The measure is the dynamic-graph model with its adapter active. Only the module that wraps it,
:mod:`peft_deploy.parity.reference`, needs Paddle; import it by name. Everything else works on any
two runners. Must not import workflows or the command line.
"""

from peft_deploy.parity.case_result import CaseResult, OutputResult
from peft_deploy.parity.cases import Case, CaseMatrix, Text, build_matrix
from peft_deploy.parity.compare import Difference, measure
from peft_deploy.parity.effect import Effect
from peft_deploy.parity.expectation import Expectation
from peft_deploy.parity.gate import CheckOptions, check, check_expectation
from peft_deploy.parity.generation import Prompt, Scores, compare_generation, score_tokens
from peft_deploy.parity.generation_result import Divergence, GenerationResult, PromptResult
from peft_deploy.parity.measurement import measure_reference
from peft_deploy.parity.oracle import Reference
from peft_deploy.parity.report import ParityReport
from peft_deploy.parity.tolerance import Limit, derive_limit

__all__ = [
    "Case",
    "CaseMatrix",
    "CaseResult",
    "CheckOptions",
    "Difference",
    "Divergence",
    "Effect",
    "Expectation",
    "GenerationResult",
    "Limit",
    "OutputResult",
    "ParityReport",
    "Prompt",
    "PromptResult",
    "Reference",
    "Scores",
    "Text",
    "build_matrix",
    "check",
    "check_expectation",
    "compare_generation",
    "derive_limit",
    "measure",
    "measure_reference",
    "score_tokens",
]
