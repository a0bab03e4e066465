"""Part of a fake of the original code, with its module paths and call signatures."""
