"""The table of a network's layers is what a forward pass does, and its drawing can be read."""
import copy

import pytest
import torch
from resnet_nbdev.layers import layer_table, plot_network
from resnet_nbdev.resnet import ARCHS, create_resnet

from random_networks import build, images, random_networks, real_shapes, same_tensors


@random_networks(5)
def test_layer_table(kw, size):
    "Against a forward pass, and against torch's counter: two operations for each multiply-add"
    from torch.utils.flop_counter import FlopCounterMode
    model = build(kw).eval()
    state = copy.deepcopy(model.state_dict())
    table = layer_table(model, size)
    with FlopCounterMode(display=False) as counter: _, shapes = real_shapes(model, images(kw, size, n=1))
    shapes.pop('flatten')
    assert table.output.to_dict() == shapes
    assert table.parameters.sum() == sum(p.numel() for p in model.parameters())
    assert table.multiply_adds.sum()*2 == counter.get_total_flops()
    counts = {k.split('.', 2)[2]: sum(v.values()) for k, v in counter.get_flop_counts().items() if k.count('.') == 2}
    for name, count in table.multiply_adds.items(): assert count*2 == counts.get(name, 0), name
    same_tensors(model.state_dict(), state)


@pytest.mark.parametrize('arch', ARCHS)
def test_drawing(arch):
    "Every stage is named, and every text can be read: none on another, none beyond the edge"
    from matplotlib import pyplot as plt
    from matplotlib.text import Text
    with torch.device('meta'): model = create_resnet(arch, 10)
    fig = plot_network(model, 32 if arch.startswith('cifar') else (224, 192))
    try:
        fig.canvas.draw()
        texts = [o for ax in fig.axes for o in ax.get_children() if isinstance(o, Text) and o.get_text().strip()]
        stages = [n for n, _ in model.body.named_children() if n.startswith('layer')]
        assert {'stem', *stages, 'head'} <= {o.get_text() for o in texts}
        boxes = [(o.get_text(), o.get_window_extent()) for o in texts]
        for i, (text, box) in enumerate(boxes):
            inside = fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1 and fig.bbox.y0 <= box.y0 and box.y1 <= fig.bbox.y1
            assert inside, (text, box, fig.bbox)
            for other, place in boxes[:i]: assert not box.overlaps(place), (text, other)
    finally: plt.close(fig)
