"""Runs: from a data set, prompts and a scheme to metrics in a work directory."""
