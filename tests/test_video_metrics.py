"""J and F against cases that can be counted by hand, and against the slow way."""

import math

import numpy as np
import pytest

from utils.video_metrics import contour_accuracy, region_similarity


def box(top, left, bottom, right, shape=(60, 80)):
    mask = np.zeros(shape, bool)
    mask[top:bottom, left:right] = True
    return mask


def test_j():
    truth = np.stack([box(10, 10, 20, 30)] * 3 + [box(0, 0, 0, 0)] * 2)
    predicted = np.stack(
        [box(10, 10, 20, 30), box(10, 20, 20, 30), box(30, 30, 40, 40), box(0, 0, 0, 0), box(5, 5, 6, 6)]
    )
    assert region_similarity(predicted, truth).tolist() == [1, 0.5, 0, 1, 0]


def test_f_of_whole_cases():
    """Outlines a pixel apart match at this size; two pixels apart they do not."""
    assert math.ceil(0.008 * math.hypot(60, 80)) == 1
    truth = box(10, 10, 40, 50)
    found = contour_accuracy(
        np.stack([truth, box(11, 11, 39, 49), box(13, 13, 37, 47), box(0, 0, 0, 0)]), np.stack([truth] * 4)
    )
    assert found[0] == 1 and found[2] == found[3] == 0
    assert 0.97 < found[1] < 1  # but at corners, where a step both ways is further than one pixel
    empty = np.zeros((2, 60, 80), bool)
    assert contour_accuracy(empty, np.stack([empty[0], truth])).tolist() == [1, 0]
    assert contour_accuracy(empty[:0], empty[:0]).shape == (0,)


def test_f_of_half_an_outline():
    """Of two boxes only one is found: all that is drawn is right, half of what there is is drawn."""
    one, other = box(5, 5, 15, 15), box(5, 45, 15, 55)
    assert contour_accuracy(one[None], (one | other)[None])[0] == pytest.approx(2 * 0.5 / 1.5)


def by_hand(predicted, truth):
    """F of one pair, pixel by pixel."""
    height, width = truth.shape
    reach = math.ceil(0.008 * math.hypot(height, width))

    def outline(mask):
        lines = set()
        for y in range(height):
            for x in range(width):
                ahead = [(min(y + dy, height - 1), min(x + dx, width - 1)) for dy, dx in ((0, 1), (1, 0), (1, 1))]
                if any(mask[y, x] != mask[place] for place in ahead):
                    lines.add((y, x))
        return lines

    def share(lines, others):
        near = [any(math.dist(line, other) <= reach for other in others) for line in lines]
        return sum(near) / len(near) if near else 1.0

    lines = outline(predicted), outline(truth)
    precision, recall = share(lines[0], lines[1]), share(lines[1], lines[0])
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_f_equals_the_slow_way():
    generator = np.random.default_rng(0)
    coarse = generator.random((4, 6, 8)) > 0.6
    truth = coarse.repeat(7, axis=1).repeat(7, axis=2)
    predicted = np.roll(truth, (1, 2), axis=(1, 2)) ^ (generator.random(truth.shape) > 0.995)
    found = contour_accuracy(predicted, truth)
    assert found == pytest.approx([by_hand(*pair) for pair in zip(predicted, truth, strict=True)])
    assert ((found > 0.1) & (found < 0.99)).all()
