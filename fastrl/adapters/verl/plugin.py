"""verl's plug-in entry point: importing this module registers fastrl's losses and estimators with verl.

verl imports every entry point of the group "verl.plugins" while it is imported itself, and the modules of the variable
VERL_USE_EXTERNAL_MODULES. It logs the failure of an entry point at debug level only, so a failure is reported here.
"""

from __future__ import annotations

import logging

from fastrl.adapters.verl.registry import register

try:
    register()
except Exception:
    logging.getLogger("fastrl").exception("fastrl's losses could not be registered with verl")
    raise
