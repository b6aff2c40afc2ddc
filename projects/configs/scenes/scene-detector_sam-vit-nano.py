"""The embedded default: detector and SAM ship with the package, scenes are generated."""

_base_ = ["../_base_/scenes.py", "../_base_/sam_vit_nano.py"]

detector = dict(type="scene-detector")
