"""Whole jobs, which the command line and the Python API both call: a module each.

Owns the order in which the packages above are put to work, and nothing else. Paddle is needed only by what a
job needs it for: validating in the dynamic graph. Nothing is imported here, so that a job starts with what it
needs itself; ``peft_deploy.export`` and its siblings are the public way in.
"""

__all__: list[str] = []
