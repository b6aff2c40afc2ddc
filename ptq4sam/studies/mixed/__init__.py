"""Bits for each unit under a budget, from what each costs the masks at each number of bits."""
