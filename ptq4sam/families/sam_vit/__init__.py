"""SAM as it was published: image encoders of ViTs (Kirillov et al., 2023)."""
