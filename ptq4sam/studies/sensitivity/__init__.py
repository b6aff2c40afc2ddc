"""Which quantizers of a model cost its masks: each alone, and all but each."""
