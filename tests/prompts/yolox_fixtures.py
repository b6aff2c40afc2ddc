"""Networks of YOLOX with random weights whose rows depend on the picture."""

from __future__ import annotations

import torch
from torch import nn

from ptq4sam.prompts.yolox_network import YoloxNetwork, YoloxSize


def random_network(size: YoloxSize, classes: int = 80) -> YoloxNetwork:
    """A network that neither loses the picture on its way nor blows up roundings."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = YoloxNetwork(size, classes)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.8, 1.2)
                nn.init.normal_(module.bias, std=0.1)
                nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.6, 1.2)  # type: ignore[arg-type]
        with torch.no_grad():
            # Pixels are 0 to 255, and rows are the exponents of sizes.
            network.backbone.backbone.stem.conv.conv.weight /= 128
            for predictor in (*network.head.reg_preds, *network.head.obj_preds):
                predictor.weight /= 10
    return network.eval()
