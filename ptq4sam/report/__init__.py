"""The report of a run or of a sweep: one HTML file that needs nothing else."""
