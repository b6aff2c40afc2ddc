"""The small SAM whose weights ship with the package."""

sam = dict(type="vit_nano")
