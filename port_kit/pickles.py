"""The reader of torch checkpoints, under the name that scripts import it by."""

from port_kit.checkpoint.pickle_reader import Storage, Tables, TensorEntry, read_tables

__all__ = ["Storage", "Tables", "TensorEntry", "read_tables"]
