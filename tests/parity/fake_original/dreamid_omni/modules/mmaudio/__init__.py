"""Part of a stand-in for the original code, with its module paths and call signatures."""
