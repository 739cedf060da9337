"""A custom dataset: drawn shapes, eight classes, no download."""

import numpy as np
from PIL import Image, ImageDraw

from cil.data.sources import from_arrays

SHAPES = {  # corners on the unit circle, in degrees, or an ellipse's aspect
    "triangle": (90, 210, 330),
    "square": (45, 135, 225, 315),
    "kite": (90, 180, 250, 0),
    "pentagon": (90, 162, 234, 306, 18),
    "star": (90, 234, 18, 162, 306),
    "bow": (45, 225, 135, 315),
    "circle": 1.0,
    "ellipse": 0.5,
}


def load(split: str, per_class: int = 40, size: int = 64):
    """The ``train`` or ``test`` split: ``per_class`` images of every shape, with random place, size and colour."""
    random = np.random.RandomState(["train", "test"].index(split))
    images, labels = [], []
    for label, shape in enumerate(SHAPES.values()):
        for _ in range(per_class):
            image = Image.new("RGB", (size, size), tuple(random.randint(0, 100, 3)))
            draw, colour = ImageDraw.Draw(image), tuple(random.randint(140, 256, 3))
            radius = random.uniform(0.2, 0.4) * size
            x, y = random.uniform(radius, size - radius, 2)
            if isinstance(shape, float):
                draw.ellipse((x - radius, y - shape * radius, x + radius, y + shape * radius), fill=colour)
            else:
                turned = np.deg2rad(np.array(shape) + random.uniform(-15, 15))
                corners = zip(x + radius * np.cos(turned), y - radius * np.sin(turned), strict=True)
                draw.polygon(list(corners), fill=colour)
            images.append(np.asarray(image))
            labels.append(label)
    return from_arrays(np.stack(images), labels, list(SHAPES))
