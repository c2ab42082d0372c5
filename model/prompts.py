"""Points, boxes and masks as users give them, checked, and as networks take them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from utils.errors import PromptError
from utils.image import ImageSpec

from .evf import EVFModel
from .types import Prompts


def read_prompts(
    size: tuple[int, int],
    points: np.ndarray | Sequence | None,
    labels: np.ndarray | Sequence | None,
    boxes: np.ndarray | Sequence | None,
    masks: np.ndarray | Tensor | None,
    side: int,
    phrases: int = 0,
) -> Prompts:
    """Return checked prompts in pixels of an image, all with the same count N; none where there are only phrases.

    Args:
        size: of the image, (H, W).
        points, labels, boxes, masks: as `ImagePredictor.predict`.
        side: of a mask prompt.
        phrases: how many go with them.

    Raises:
        PromptError: shapes that do not fit, a label other than 0 and 1, or a place that cannot be.
    """
    found = {}
    if points is not None:
        found["points"] = read_points(points)
        found["labels"] = read_labels(labels, found["points"])
    elif labels is not None:
        raise PromptError("labels without points. Give points too")
    if boxes is not None:
        found["boxes"] = read_boxes(boxes)
    if masks is not None:
        needed = f"[{side}, {side}] or [N, {side}, {side}], the low_res of an earlier prediction"
        found["masks"] = with_batch(masks, (side, side), "masks", needed)[:, None]
    if not found:
        if not phrases:
            raise PromptError("nothing to look for. Give a phrase, points, a box or a mask")
        return Prompts()
    count = max(phrases, *(len(value) for value in found.values()))
    for name, value in found.items():
        if len(value) not in (1, count):
            raise PromptError(f"{len(value)} {name} for {count} prompts. Give one for all, or one each")
        found[name] = value.expand(count, *value.shape[1:])
    if phrases not in (0, count):
        raise PromptError(f"{phrases} phrases for {count} prompts. Give one of each for all, or one each")
    prompts = Prompts(**found)
    check_places(prompts, size)
    return prompts


def check_places(prompts: Prompts, size: tuple[int, int]) -> None:
    """Refuse points outside an image of `size` (H, W), and boxes that cover nothing of it.

    Raises:
        PromptError: the first of them.
    """
    limit = torch.tensor([size[1], size[0]])
    where = f"outside the image, which is {size[1]} wide and {size[0]} high"
    if prompts.points is not None:
        is_outside = ((prompts.points < 0) | (prompts.points > limit)).any(-1)
        if is_outside.any():
            raise PromptError(f"point {_text(prompts.points[is_outside])} lies {where}")
    if prompts.boxes is not None:
        is_outside = ((prompts.boxes[:, 2:] <= 0) | (prompts.boxes[:, :2] >= limit)).any(-1)
        if is_outside.any():
            raise PromptError(f"box {_text(prompts.boxes[is_outside])} lies {where}")


def _text(rows: Tensor) -> str:
    return "({})".format(", ".join(f"{value:g}" for value in rows[0].tolist()))


def read_points(points: np.ndarray | Sequence | Tensor) -> Tensor:
    """Return points as float32 [N, P, 2].

    Raises:
        PromptError: another shape.
    """
    return with_batch(points, (None, 2), "points", "[P, 2] or [N, P, 2]")


def read_labels(labels: np.ndarray | Sequence | None, points: Tensor) -> Tensor:
    """Return the labels of points, int64 [N, P]; all 1 where there are none.

    Raises:
        PromptError: another count, or a label other than 0 and 1.
    """
    values = np.ones(points.shape[:2]) if labels is None else labels
    values = with_batch(values, (None,), "labels", "[P] or [N, P]")
    if values.shape[1] != points.shape[1]:
        raise PromptError(f"{points.shape[1]} points, but {values.shape[1]} labels")
    wrong = values[(values != 0) & (values != 1)]
    if len(wrong):
        raise PromptError(f"label {wrong[0].item():g}: labels are 1 (foreground) or 0 (background)")
    return values.long()


def read_boxes(boxes: np.ndarray | Sequence | Tensor) -> Tensor:
    """Return boxes as float32 [N, 4], x1 y1 x2 y2.

    Raises:
        PromptError: another shape, or a box that is inverted or empty.
    """
    values = with_batch(boxes, (4,), "boxes", "[4] or [N, 4], x1 y1 x2 y2")
    is_empty = (values[:, 2:] <= values[:, :2]).any(1)
    if is_empty.any():
        raise PromptError(f"box {_text(values[is_empty])} is empty: needed is x1 y1 x2 y2 with x1 < x2 and y1 < y2")
    return values


def to_input(prompts: Prompts, spec: ImageSpec, size: tuple[int, int], model: EVFModel) -> Prompts:
    """Return prompts in the pixels of a network input, on the model's device.

    Args:
        prompts: in pixels of an image of `size` (H, W), which `spec` prepares.
    """
    resized = spec.resized_size(*size)
    scale = torch.tensor([resized[1] / size[1], resized[0] / size[0]])
    device = model.device  # positions stay float32 in every precision: bf16 cannot count to 1024
    return Prompts(
        None if prompts.points is None else (prompts.points * scale).to(device),
        None if prompts.labels is None else prompts.labels.to(device),
        None if prompts.boxes is None else (prompts.boxes * scale.repeat(2)).to(device),
        None if prompts.masks is None else prompts.masks.to(device, model.dtype),
    )


def with_batch(values: np.ndarray | Sequence | Tensor, shape: tuple[int | None, ...], name: str, needed: str) -> Tensor:
    """Return finite float32 [N, *shape]; None in `shape` stands for any size."""
    try:
        array = values.detach().cpu() if isinstance(values, Tensor) else values
        tensor = torch.as_tensor(np.asarray(array, dtype=np.float32))
    except (ValueError, TypeError):
        raise PromptError(f"{name} are not numbers of one shape; needed {needed}") from None
    found = list(tensor.shape)
    if tensor.ndim == len(shape):
        tensor = tensor[None]
    fits = tensor.ndim == len(shape) + 1 and all(
        size in (None, given) for size, given in zip(shape, tensor.shape[1:], strict=True)
    )
    if not fits or 0 in tensor.shape or not tensor.isfinite().all():
        raise PromptError(f"{name} have shape {found}; needed {needed}, finite numbers")
    return tensor
