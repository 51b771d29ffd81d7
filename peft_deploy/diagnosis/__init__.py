"""What is installed on this machine, and what is known to go wrong with it.

Reads the metadata of installed packages and compares it with this distribution's own requirements and with a table
of known bad combinations. Uses nothing but the standard library, so that it still works where the packages that it
judges cannot be imported; must not import anything below the error tree.
"""

from peft_deploy.diagnosis.conflicts import CONFLICTS, Conflict, find_conflicts
from peft_deploy.diagnosis.extras import ExtraState, PackageState, installed_packages, read_extras
from peft_deploy.diagnosis.machine import Machine, this_machine
from peft_deploy.diagnosis.machine_checks import check_machine
from peft_deploy.diagnosis.report import BASE_INSTALL, BROKEN, Check, Diagnosis, Verdict
from peft_deploy.diagnosis.versions import Requirement, fits, version_key

__all__ = [
    "BASE_INSTALL",
    "BROKEN",
    "CONFLICTS",
    "Check",
    "Conflict",
    "Diagnosis",
    "ExtraState",
    "Machine",
    "PackageState",
    "Requirement",
    "Verdict",
    "check_machine",
    "find_conflicts",
    "fits",
    "installed_packages",
    "read_extras",
    "this_machine",
    "version_key",
]
