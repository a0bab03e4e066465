"""Propose a rule set from two manifests alone: names and shapes, nothing else."""
