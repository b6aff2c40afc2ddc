"""Generated scenes, as ptq4sam.data.scenes.write_scenes writes them to data/scenes."""

data = dict(
    images="data/scenes/images/val",
    annotations="data/scenes/annotations/val.json",
)
calibration = dict(
    images="data/scenes/images/train",
    annotations="data/scenes/annotations/train.json",
)
