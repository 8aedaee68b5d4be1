"""The command line: `dualcodebook COMMAND`, one file for each family of commands.

What can be wrong with the input is checked before a model is loaded; images are decoded as they are used, and what a
command writes appears at its end, or not at all. One line says what is wrong, and the exit code is 2. Heavy modules are
imported by the commands that need them.
"""

from .main import main

__all__ = ["main"]
