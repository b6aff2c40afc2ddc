"""The float models: SAM's image encoder, prompt encoder and mask decoder, and their weights."""
