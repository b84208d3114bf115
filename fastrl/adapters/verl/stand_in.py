"""Importing this module calls `install()`: verl's own names then run fastrl in this process.

For the variable whose modules verl imports in every process:

    VERL_USE_EXTERNAL_MODULES=fastrl.adapters.verl.stand_in
"""

from fastrl.adapters.verl.registry import install

install()
