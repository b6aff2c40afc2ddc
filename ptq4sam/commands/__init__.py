"""The verbs of the `ptq4sam` command: a module each, with `add_arguments` and `run`."""
