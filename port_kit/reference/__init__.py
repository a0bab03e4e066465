"""Parity on real weights: the original code, run on this machine, gives the goldens that the port is compared with.

A port names a :class:`Reference`: which git code of its recipe is the original, and a script that runs it. The script
runs in a process, and where the user says so in an environment, of its own (:func:`record`); it is given a request
as JSON and leaves a goldens folder. The kit never imports the original code.
"""

from port_kit.reference.declaration import Reference
from port_kit.reference.record import Recording, Settings, record

__all__ = ["Recording", "Reference", "Settings", "record"]
