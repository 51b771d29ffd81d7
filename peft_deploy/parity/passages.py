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

# What scales of 4-bit weights are chosen by, where nobody gives a text of their own: a bit of everything. It has
# nothing in common with the text above, on which the result is measured.
CALIBRATION = (
    "Bread needs four things: flour, water, salt and time. Mix 500 g of flour with 350 g of water, wait half an hour, "
    "then add 10 g of salt and a little yeast. Fold the dough every 30 minutes until it holds its shape, and let it "
    "rise overnight in a cold place. Bake it at 240 °C for 35 to 40 minutes.\n\n"
    "User: My train leaves at 17:45, and the walk to the station takes twenty minutes. When should I leave?\n"
    "Assistant: Leave at 17:20 at the latest. That gives you five minutes to find the platform.\n\n"
    "The river Danube rises in the Black Forest in Germany and flows through ten countries before it reaches the "
    "Black Sea; only the Volga is longer in Europe. Vienna, Bratislava, Budapest and Belgrade lie on its banks. "
    "Romans called it Danubius and kept a fleet on it, because for centuries it was the northern border of their "
    "empire.\n\n"
    "def mean(values: list[float]) -> float:\n"
    '    """The average; 0 for an empty list."""\n'
    "    if not values:\n"
    "        return 0.0\n"
    "    return sum(values) / len(values)\n\n"
    "“You cannot mean that,” said Anna, and put down her cup. “Why not?” he asked. “Because nobody has lived in that "
    "house since my grandmother was a child, and yet there was a light in it last night.”\n\n"
    "Question: Why is the sky blue?\nAnswer: Air scatters short waves of sunlight more strongly than long ones, so "
    "blue light reaches our eyes from every direction.\n\n"
    "Les trois enfants couraient vers la mer. Der Zug nach Köln hat heute leider Verspätung. "
    "今天下午我们去图书馆。\n\n"
    "1. Switch the machine off and unplug it.\n2. Remove the two screws on the back (see figure 3).\n3. Replace the "
    "filter; it costs about $12.50, and lasts for six months.\n\n"
    "In mathematics, a prime number is a whole number greater than 1 that has no divisors but 1 and itself. There are "
    "infinitely many of them: if p is the product of all known primes, p + 1 has a prime factor that is not among "
    "them.\n"
)
