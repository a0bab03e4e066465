"""Reading checkpoint files: byte sources, the pickle reader, safetensors headers, indexes, one table of dtypes."""
