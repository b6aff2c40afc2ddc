"""Studies of many runs' worth: sensitivity, bits for each unit, the published table."""
