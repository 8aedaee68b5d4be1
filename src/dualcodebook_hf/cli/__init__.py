"""The command line: `dualcodebook COMMAND`, one file for each family of commands.

Everything that can be wrong with the input is looked at before a model is loaded or anything is written; then one line
says what is wrong and the exit code is 2. Heavy modules are imported by the commands that need them.
"""

from .main import main

__all__ = ["main"]
