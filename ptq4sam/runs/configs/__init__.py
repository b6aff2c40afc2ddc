"""Configuration files under projects/configs/: read, checked, and looked up by name."""
