"""One training step of the published code: loss, its terms, what is trained, and every gradient's norm."""

import numpy as np
import pytest
import torch

from configs.training import LossArgs, ModelArgs
from model.checkpoints import evf_sam
from model.checkpoints.rules import KeyMap, named_tensors
from model.freeze import choose_trained, leave_out_idle
from model.training import TrainingStep
from utils.image import read_image

from .support import EVF, cases, golden_model, largest_difference, needs_golden_data, read_case

pytestmark = needs_golden_data

RELATIVE = 2e-3
"""Allowed for gradient norms, relative: they sum products of thousands of rounded numbers."""


def ground_truth(case, sizes):
    """Return uint8 [n_i, H_i, W_i] per image from the rule of the golden files."""
    masks = []
    for i, (height, width) in enumerate(sizes):
        y, x = np.mgrid[:height, :width].astype(np.float64)
        rows = [row for row in case["gt"] if row[0] == i]
        discs = [(x / width - cx) ** 2 + (y / height - cy) ** 2 < r * r for _, _, cy, cx, r in rows]
        masks.append(torch.from_numpy(np.stack(discs).astype(np.uint8)))
    return masks


@pytest.mark.parametrize("path", cases("training/*.json"), ids=lambda path: path.stem)
def test_one_step(path):
    torch.set_num_threads(2)
    case, golden = read_case(path)
    model = golden_model(case["arch"], case["seed"]).train()
    options = case["constructor"]
    args = ModelArgs(
        train_mask_decoder=options.get("train_mask_decoder", False),
        train_prompt_encoder=options.get("train_prompt_encoder", False),
    )
    choose_trained(model, args)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == case["trainable_parameters"]
    leave_out_idle(model)

    images = [read_image(EVF / "images" / name) for name in case["images"]]
    step = TrainingStep(model, LossArgs())
    pixels = torch.stack([step.spec(image) for image in images])
    small = torch.stack([model.encoder.image_spec(image) for image in images])
    ids = torch.tensor(case["input_ids"])
    index = torch.repeat_interleave(torch.arange(len(images)), torch.tensor(np.diff(case["offset"])))
    masks = ground_truth(case, [image.shape[:2] for image in images])
    assert [[float(mask.sum()) for mask in part] for part in masks] == case["gt_area"]

    losses = step(pixels, small, ids, ids == 1, index, masks)
    losses.mean(0).sum().backward()
    bce, dice = losses.detach().mean(0)
    assert abs(float(bce) - case["mask_bce_loss"]) < 1e-5
    assert abs(float(dice) - case["mask_dice_loss"]) < 1e-5
    assert abs(float(bce + dice) - case["loss"]) < 1e-5

    tensors = named_tensors(model)
    theirs = KeyMap(tensors, evf_sam.sections(model.config.family)).theirs
    norms = {
        theirs[name][0]: float(tensor.grad.norm())
        for name, tensor in tensors.items()
        if tensor.requires_grad and tensor.grad is not None
    }
    silent = set(case["no_gradient"]) | set(case["zero_gradient"])
    assert not [name for name in silent if norms.get(name)]
    expected = {name: norm or 0.0 for name, norm in case["grad_norm_per_tensor"].items()}
    floor = 1e-6 * max(expected.values())
    wrong = {n: (norms.get(n), v) for n, v in expected.items() if abs(norms.get(n, 0.0) - v) > RELATIVE * v + floor}
    assert not wrong
    beginnings = {
        "text_hidden_fcs": "text_hidden_fcs.",
        "beit3_last_layer": f"mm_extractor.beit3.encoder.layers.{model.encoder.config.layers - 1}.",
        "beit3": "mm_extractor.",
        "visual_model": "visual_model.",
    }
    for part, total in case["grad_norm_total"].items():
        ours = sum(norm**2 for name, norm in norms.items() if name.startswith(beginnings[part])) ** 0.5
        assert abs(ours - total) < RELATIVE * total, part
    projector = model.projector.fc2
    assert largest_difference(projector.bias.grad, golden["text_hidden_fcs_0_2_bias_grad"]) < 1e-5
    assert largest_difference(projector.weight.grad[::4, ::4], golden["text_hidden_fcs_0_2_weight_grad_s4"]) < 1e-5
    assert largest_difference(model.encoder.vision_embed.cls_token.grad[0, 0], golden["cls_token_grad"]) < 1e-5
    last = model.encoder.layers[-1].ffn.A.fc2.bias.grad
    assert largest_difference(last, golden["last_layer_ffn_A_fc2_bias_grad"]) < 1e-5
