"""Sweeps: a grid of settings, its trials, and what they share.

`grid` reads a file into trials, `tasks` finds what trials share, `scheduler` gives both to workers
(`processes`, `cluster`) and records what comes back (`store`), `summary` shows it.
"""
