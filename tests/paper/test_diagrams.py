"""A drawing of a network shows the shapes that a forward pass has."""

import matplotlib.pyplot as plt
import pytest

from cryo_lib.networks import models
from cryo_lib.paper import diagrams


def test_the_trace_is_what_a_forward_pass_gives():
    stages = diagrams.trace(models.ResNetGenerator(128, 4))
    assert [shape for *_, shape in stages] == [
        (4, 64, 64),
        (8, 32, 32),
        (16, 16, 16),
        (8, 32, 32),
        (4, 64, 64),
        (1, 128, 128),
    ]
    assert [blocks for _, blocks, _ in stages] == [3, 3, 3, 3, 3, 0]
    assert ["transposed" in name for name, *_ in stages] == [False] * 3 + [True] * 3
    stages = diagrams.trace(models.ResNetDiscriminator(128, 4))
    assert stages[-1] == ("conv 4×4, stride 1", 0, (1, 13, 13)) and [b for _, b, _ in stages] == [2, 2, 3, 0]


@pytest.mark.parametrize("network", [models.ResNetGenerator(32, 2), models.ResNetDiscriminator(32, 2)])
def test_a_drawing_names_every_shape(network):
    figure, ax = plt.subplots()
    diagrams.draw_network(ax, network, "end")
    texts = {text.get_text() for text in ax.texts}
    assert {f"{c} × {h}²" for _, _, (c, h, _) in diagrams.trace(network)} | {"end", "1 × 32²"} <= texts
    assert sum("skip" in text.get_text() for text in ax.texts) == (2 if hasattr(network, "up") else 0)
    plt.close(figure)
