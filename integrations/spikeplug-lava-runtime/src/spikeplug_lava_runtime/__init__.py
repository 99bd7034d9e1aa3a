"""Integer spiking networks exported by Spikeplug: load, run, verify. Needs numpy and safetensors alone.

The file format is described in Spikeplug's documentation, "Integer networks". Lava is imported by `on_lava` only.
"""

from spikeplug_lava_runtime.bundle import load, save
from spikeplug_lava_runtime.format import Bundle, FormatError
from spikeplug_lava_runtime.interpreter import Result, run
from spikeplug_lava_runtime.verify import Verdict, verify

__version__ = "0.1.0"

__all__ = ["Bundle", "FormatError", "Result", "Verdict", "load", "run", "save", "verify"]
