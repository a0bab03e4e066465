"""The conversion of checkpoints, under the name that scripts import it by."""

from port_kit.checkpoint.convert import Conversion, convert_file

__all__ = ["Conversion", "convert_file"]
