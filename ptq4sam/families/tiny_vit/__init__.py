"""TinyViT SAMs: MobileSAM and TinySAM."""
