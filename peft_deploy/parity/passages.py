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

# What a lower precision costs is measured on this: a few hundred tokens of plain prose.
PROSE = (
    "The keeper of the lighthouse had two clocks. One of them stood on the shelf above the stove and was always a few "
    "minutes late, because the stove dried its oil; the other hung in the lamp room and was set every noon by the "
    "sun. When a ship went by at night, he wrote down the time of both, and the weather, and how many lights he had "
    "counted on her deck. Nobody had asked him to do so. His father had kept the same book, and the pages before his "
    "own were full of a smaller hand that spelled the names of the ships as they sounded.\n\n"
    "In the autumn a letter came from the harbour office. A steamer had run onto the northern bank in March, it said, "
    "and the owners held that the lamp had been out between two and four in the morning. Would he kindly state what "
    "he remembered? He remembered nothing, but he had the book. He copied the page, both times and all, and sent it "
    "with the mail boat. Three weeks later a second letter thanked him: the late clock had saved him, for it showed "
    "that he had climbed the stairs and come down again within eight minutes, and that the lamp had burned as "
    "brightly at the end as at the beginning.\n\n"
    "After that he wound the clock above the stove with more care. He moved it no further from the heat, though. A "
    "clock that is wrong in a way one knows, he told the boy who brought the oil, is as good as one that is right, "
    "and better than one of which nobody knows how wrong it is. The boy laughed, and wrote it down in his own book.\n"
)
