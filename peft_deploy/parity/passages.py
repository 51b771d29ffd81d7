"""The real text that the checks run on, when the model has a tokenizer."""

from __future__ import annotations

# Forward passes: prose, figures, another script and code, all within the first thirty tokens or so.
PASSAGE = (
    "In 1907 he wrote: “A ship!” 天气很好 def f(r): return 2.5 * r  # naïve\n"
    "The lamp had burned all night, and 2 x 37 = 74 flashes had been counted from the shore."
)

# Greedy generation: prompts that a model of any size continues in its own way.
PROMPTS = (
    "The capital of France is",
    "Question: Why does ice float on water?\nAnswer:",
    "Once upon a time, in a village at the foot of a mountain, there lived",
    "def fibonacci(n):\n",
)
