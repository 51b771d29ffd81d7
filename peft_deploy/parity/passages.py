"""The real text that the checks run on, when the model has a tokenizer."""

from __future__ import annotations

# Forward passes: prose, figures, another script and code, all within the first forty tokens or so.
PASSAGE = (
    "On 14 March 1907 the keeper wrote: “A ship answered.” 今天天气很好。 "
    "def area(r): return 3.14159 * r ** 2  # naïve\n"
    "The lamp had burned all night, and 2 x 37 = 74 flashes had been counted."
)

# Greedy generation: prompts that a model of any size continues in its own way.
PROMPTS = (
    "The capital of France is",
    "Question: Why does ice float on water?\nAnswer:",
    "Once upon a time, in a village at the foot of a mountain, there lived",
    "def fibonacci(n):\n",
)
