"""Losses, what is trained, LoRA, the feature cache, the mixture, and checkpoints of a run."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configs.nested import from_values, read_config, to_values, to_yaml
from configs.training import DataArgs, LossArgs, ModelArgs, OptimArgs, TrainConfig, accumulation
from datasets.catalog import open_dataset
from datasets.collate import Collate
from datasets.mixture import Group, Mixture, Shares, spread, training_steps
from datasets.sample import Sample
from model.checkpoints.load import load_model, save_model
from model.freeze import choose_trained, leave_out_idle, part_of, report, report_text
from model.losses import contrast_losses, iou_losses, mask_losses, place_losses, point_losses, pointing_losses
from model.training import (
    BatchInputs,
    TrainingStep,
    add_lora,
    feature_digest,
    lora_tensors,
    model_tensors,
    open_cache,
    optimizer_groups,
    prepare_model,
    restore,
)
from tests.conftest import PICO, ROOT, TOKENIZER, make_picture, pico_model
from tests.own_scenes import write_own
from utils.engine import AccelerateEngine, OptimizerSettings, build_engine
from utils.errors import CheckpointError, DataError, TrainingError
from utils.feature_cache import name_of
from utils.image import ImageSpec
from utils.run_folder import RunFolder, read_state, write_state
from utils.tokenizer import PhraseTokenizer
from utils.trainer import Schedule

EXPERIMENTS = sorted((ROOT / "configs" / "experiment").glob("*.yaml"))


def make_samples(count=2, phrases=2):
    samples = []
    for i in range(count):
        image = np.roll(make_picture()[: 100 + 4 * i], 11 * i, axis=1)
        masks = np.zeros((phrases, *image.shape[:2]), np.uint8)
        for k in range(phrases):
            masks[k, 10 + 20 * k : 50 + 20 * k, 20 + i : 90] = 1
        texts = tuple(f"thing {k} on the left" for k in range(phrases))
        samples.append(Sample(image, texts, tuple(f"{i}/{k}" for k in range(phrases)), masks, f"toy/{i}", i))
    return samples


def make_step(family, args=None, loss=None):
    model = pico_model(family)
    choose_trained(model, args or ModelArgs())
    leave_out_idle(model, loss or LossArgs())
    return TrainingStep(model.train(), loss or LossArgs())


def make_batch(step, samples=None, cache=None):
    words = PhraseTokenizer(TOKENIZER, max_length=62)
    return Collate(step.spec, step.model.encoder.image_spec, words, cache)(samples or make_samples())


# losses


def test_losses_are_the_published_formula():
    torch.manual_seed(0)
    logits, truth = torch.randn(3, 20, 30), torch.randint(0, 2, (3, 20, 30), dtype=torch.uint8)
    losses = mask_losses(logits, truth)
    for row, one, mask in zip(losses, logits.double(), truth.double(), strict=True):
        chance = one.sigmoid()
        bce = -(mask * chance.log() + (1 - mask) * (1 - chance).log()).mean()
        overlap, area = 2 * (chance * mask).sum() / 1000, chance.sum() / 1000 + mask.sum() / 1000
        dice = 1 - (overlap + 1e-6) / (area + 1e-6)
        assert torch.allclose(row.double(), torch.stack([bce, dice]), atol=1e-6)


def test_ignored_pixels_do_not_count():
    torch.manual_seed(0)
    logits, truth = torch.randn(1, 8, 8), torch.randint(0, 2, (1, 8, 8), dtype=torch.uint8)
    part = mask_losses(logits[:, :, :5], truth[:, :, :5])
    truth[:, :, 5:] = 255
    logits.requires_grad_()
    losses = mask_losses(logits, truth)
    assert torch.allclose(losses, part)
    losses.sum().backward()
    assert logits.grad[:, :, 5:].abs().max() == 0 and logits.grad[:, :, :5].abs().min() > 0
    assert mask_losses(torch.randn(1, 4, 4), torch.full((1, 4, 4), 255, dtype=torch.uint8))[0, 0] == 0


@pytest.mark.parametrize("resize", ["letterbox", "square"])
def test_many_points_agree_with_all_pixels(resize):
    """Points sampled evenly see the same loss as the resized logits do, also where the input is padded."""
    torch.manual_seed(0)
    spec = ImageSpec(size=64, resize=resize)
    size = (40, 64)
    low = F.interpolate(torch.randn(1, 2, 4, 4) * 3, (16, 16), mode="bilinear")[0]
    rows, columns = spec.resized_size(*size)
    full = F.interpolate(low[None], (64, 64), mode="bilinear", align_corners=False)[..., :rows, :columns]
    full = F.interpolate(full, size, mode="bilinear", align_corners=False)[0]
    truth = (full > 0.3).to(torch.uint8)
    expected = mask_losses(full, truth)[:, 0]
    import model.losses as losses

    share, losses.UNCERTAIN_SHARE = losses.UNCERTAIN_SHARE, 0.0
    try:
        found = point_losses(low, truth, spec, 40_000)[:, 0]
    finally:
        losses.UNCERTAIN_SHARE = share
    assert torch.allclose(found, expected, rtol=0.08)
    near = point_losses(low, truth, spec, 2000)[:, 0]
    assert (near > expected).all()  # most points lie where the mask is in doubt


def test_point_loss_trains():
    step = make_step("sam", loss=LossArgs(points=64))
    batch = make_batch(step)
    step(*BatchInputs(step)(batch)).sum().backward()
    assert all(p.grad is not None for p in step.parameters() if p.requires_grad)


def patches_by_hand(mask, side):
    """Return the share of each patch that is 1, float [side * side]: the slow way."""
    height, width = mask.shape[0] // side, mask.shape[1] // side
    rows = [mask[y * height : (y + 1) * height] for y in range(side)]
    return torch.tensor([float((row[:, x * width : (x + 1) * width] == 1).float().mean()) for row in rows
                         for x in range(side)])  # fmt: skip


def test_pointing_loss_asks_for_the_patches_of_what_is_meant():
    torch.manual_seed(0)
    masks = (torch.rand(3, 12, 20) > 0.7).to(torch.uint8)
    fit = torch.randn(3, 4, 4, requires_grad=True)
    found = pointing_losses(fit, masks)
    for row, mask, value in zip(fit.flatten(1), masks, found, strict=True):
        share = patches_by_hand(mask, 4)
        chance = row.sigmoid()
        each = -(share * chance.log() + (1 - share) * (1 - chance).log()).mean()
        where = -(share / share.sum() * row.log_softmax(0)).sum()
        assert torch.allclose(value, 3 * each + where, atol=1e-5)
    nothing = pointing_losses(fit, torch.zeros_like(masks))
    assert torch.allclose(nothing, -3 * (1 - fit.sigmoid()).log().flatten(1).mean(1), atol=1e-5)
    masks[0, :, 10:] = 255
    pointing_losses(fit, masks)[0].backward()
    assert fit.grad[0, :, 2:].abs().max() == 0 < fit.grad[0, :, :2].abs().min()


@pytest.mark.parametrize("family", sorted(PICO))
def test_the_code_of_a_region_says_where_it_is(family):
    """Of a small region, the code of its place in the square input; of two, their mean; of none, 0."""
    segmenter = pico_model(family).segmenter
    side = 96 if segmenter.image_spec.resize == "letterbox" else None
    height, width = side or 96, side or 64
    place = torch.tensor([33 / width, 49.5 / height]) * 2 - 1
    owned = (*segmenter.named_buffers(), *segmenter.named_parameters())
    matrix = next(tensor.detach() for name, tensor in owned if tensor.shape == (2, 128) and "position" in name)
    matrix.normal_(generator=torch.Generator().manual_seed(0))  # the library starts SAM's 128 times as wide
    masks = torch.zeros(3, 96, 64, dtype=torch.uint8)
    masks[0, 48:51, 32:34] = masks[1, 48:51, 32:34] = masks[1, :3, :2] = 1
    shares, cells = segmenter.region_shares(masks), segmenter.cell_codes()
    assert shares.sum(1).tolist() == pytest.approx([1, 1, 0], abs=1e-5)
    codes = (shares @ cells).detach()
    angles = 2 * torch.pi * (place @ matrix)
    assert torch.cosine_similarity(codes[0], torch.cat([angles.sin(), angles.cos()]), dim=0) > 0.9
    assert torch.allclose(codes[1], (codes[0] + cells[0]) / 2, atol=0.05) and not codes[2].any()


def test_place_loss_is_least_at_the_place():
    torch.manual_seed(0)
    cells = torch.nn.functional.normalize(torch.randn(9, 256), dim=1) * 128**0.5
    shares = torch.zeros(2, 9)
    shares[0, [2, 5]] = 0.5
    prompts = torch.randn(2, 256)
    found = place_losses(prompts, shares, cells)
    logits = prompts[0] @ cells.T * 20 / 128
    where = -(logits.log_softmax(0)[2] + logits.log_softmax(0)[5]) / 2
    assert torch.allclose(found[0], 10 * (prompts[0] - (cells[2] + cells[5]) / 2).square().mean() + where, rtol=1e-4)
    assert torch.allclose(found[1], 10 * prompts[1].square().mean())
    right = [place_losses(cells[[n]], shares[:1], cells) for n in range(9)]
    assert sorted(range(9), key=lambda n: float(right[n]))[:2] in ([2, 5], [5, 2])


def test_contrast_loss_looks_through_all_images():
    torch.manual_seed(0)
    words, patches = torch.randn(3, 6), torch.randn(2, 9, 6)
    index = torch.tensor([0, 0, 1])
    masks = [(torch.rand(2, 9, 9) > 0.8).to(torch.uint8), torch.zeros(1, 6, 6, dtype=torch.uint8)]
    found = contrast_losses(words, patches, index, masks)
    every = patches.reshape(18, 6)
    for n in range(2):
        cosines = torch.stack([torch.cosine_similarity(words[n], patch, dim=0) for patch in every]) / 0.07
        share = patches_by_hand(masks[0][n], 3)
        expected = -(share / share.sum() * cosines.log_softmax(0)[:9]).sum()
        assert torch.allclose(found[n], expected, atol=1e-5)
    assert found[2] == 0  # it means nothing, so it has nothing to find


def test_iou_loss_wants_zero_where_nothing_is_meant():
    logits = torch.tensor([[[1.0, -1.0], [1.0, 1.0]]] * 3)
    masks = torch.tensor([[[1, 1], [1, 0]], [[0, 0], [0, 0]], [[1, 255], [1, 255]]], dtype=torch.uint8)
    scores = torch.tensor([0.25, 0.25, 0.25])
    expected = (scores - torch.tensor([2 / 4, 0.0, 1.0])) ** 2
    assert torch.allclose(iou_losses(scores, logits, masks), expected)


@pytest.mark.parametrize("family", sorted(PICO))
def test_every_term_trains_on_its_own(family):
    terms = {"pointing": 0.5, "contrast": 0.25, "prompt": 0.3, "regions": 0.7, "iou": 2.0}
    if family == "ovsam":
        with pytest.raises(TrainingError, match="predicts no IoU"):
            make_step(family, ModelArgs(train_mask_decoder=True), LossArgs(**terms))
        del terms["iou"]
    loss = LossArgs(**terms)
    assert list(loss.terms()) == ["bce", "dice", *terms] and loss.terms().get("iou", 2.0) == 2.0
    step = make_step(family, ModelArgs(train_mask_decoder=True), loss)
    batch = make_batch(step)
    losses = step(*BatchInputs(step)(batch))
    assert losses.shape == (len(batch.phrases), 2 + len(terms)) and losses.isfinite().all()
    plain = TrainingStep(step.model, LossArgs())(*BatchInputs(step)(batch))
    assert torch.allclose(losses[:, :2], plain)
    parts = {}
    for n, name in enumerate(loss.terms()):
        step.zero_grad()
        losses[:, n].sum().backward(retain_graph=True)
        moved = {key for key, p in step.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        parts[name] = {part_of(step.model, key.removeprefix("model.")) for key in moved}
    assert parts["pointing"] == parts["contrast"] == {"encoder"} and parts["prompt"] == {"encoder", "projector"}
    assert "mask_decoder" in parts["regions"] and not parts["regions"] & {"encoder", "projector"}
    assert "encoder" in parts["bce"] and ("iou" not in parts or "mask_decoder" in parts["iou"])


def test_iou_head_is_trained_only_where_the_loss_asks_for_it():
    for loss in (LossArgs(), LossArgs(iou=1)):
        model = pico_model("efficient_sam").requires_grad_(True)
        idle = leave_out_idle(model, loss).idle
        assert any("iou_prediction_head" in name for name in idle) != bool(loss.iou)


@pytest.mark.parametrize("family", sorted(PICO))
def test_the_segmenter_can_be_trained_without_the_encoder(family):
    loss = LossArgs(bce=0, dice=0, regions=1.0)
    args = ModelArgs(train_image_encoder=True, train_mask_decoder=True)
    step = make_step(family, args, loss)
    parts = {part_of(step.model, name.removeprefix("model.")) for name, p in step.named_parameters() if p.requires_grad}
    assert {"image_encoder", "mask_decoder"} <= parts and not parts & {"encoder", "projector"}
    batch = make_batch(step)
    losses = step(*BatchInputs(step)(batch))
    assert losses.shape == (len(batch.phrases), 1)
    losses.sum().backward()
    for name, parameter in step.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("weights", [{"contrast": 1.0}, {"pointing": 1.0}, {"pointing": 1.0, "contrast": 1.0}])
def test_the_encoder_can_be_trained_without_masks(weights):
    loss = LossArgs(bce=0, dice=0, **weights)
    step = make_step("sam", ModelArgs(train_image_encoder=True), loss)
    trained = {
        part_of(step.model, name.removeprefix("model.")) for name, p in step.named_parameters() if p.requires_grad
    }
    assert trained == {"encoder"} and list(loss.terms()) == list(weights)
    losses = step(*BatchInputs(step)(make_batch(step)))
    assert losses.shape[1] == len(weights)
    losses.sum().backward()
    for name, parameter in step.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    whole = make_step("sam", ModelArgs(train_image_encoder=True), LossArgs(**weights))
    batch = make_batch(whole)
    assert torch.allclose(whole(*BatchInputs(whole)(batch))[:, 2:], losses, atol=1e-6)


# what is trained


@pytest.mark.parametrize("family", sorted(PICO))
def test_what_is_trained_gets_a_gradient_and_nothing_else_does(family):
    step = make_step(family)
    model = step.model
    segmenter = model.segmenter
    trained = {segmenter.part_of(name) for name, p in segmenter.named_parameters() if p.requires_grad}
    expected = {"sam": {"mask_decoder", "prompt_encoder"}, "efficient_sam": {"mask_decoder"}, "sam2": set()}
    expected["efficientvit_sam"] = expected["ovsam"] = expected["sam"]
    assert trained == expected[family]
    step(*BatchInputs(step)(make_batch(step))).sum().backward()
    for name, parameter in step.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert step.has_frozen_images


def test_statistics_of_a_frozen_image_encoder_stay():
    """Batch norm would learn them from every batch, and use those of the batch, also where no weight is trained."""
    step = make_step("efficientvit_sam").train()
    norms = [m for m in step.model.segmenter.image_encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    batch = make_batch(step)
    step(*BatchInputs(step)(batch))
    assert norms and all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    assert step.model.encoder.training
    trained = make_step("efficientvit_sam", ModelArgs(train_image_encoder=True)).train()
    trained(*BatchInputs(trained)(batch))
    norm = trained.model.segmenter.image_encoder.backbone[0][0].norm
    assert norm.training and norm.num_batches_tracked == 1


def test_idle_parameters_would_get_no_gradient():
    model = pico_model("sam")
    model.requires_grad_(True)
    idle = leave_out_idle(pico_with(model)).idle
    model.train()
    step = TrainingStep(model, LossArgs())
    step(*BatchInputs(step)(make_batch(step))).sum().backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None}
    assert silent == set(idle) and any("mask_token" in name for name in idle)


def pico_with(model):
    """Return a copy, so that the probe cannot change what is compared with it."""
    import copy

    return copy.deepcopy(model)


def test_parts_can_be_chosen():
    step = make_step("sam2", ModelArgs(train_mask_decoder=True, train_image_encoder=True, train_encoder=False))
    counts = {part.name: part for part in report(step.model, {})}
    assert counts["encoder"].trained == 0 < counts["projector"].trained
    assert counts["image_encoder"].trained and counts["mask_decoder"].trained
    assert not step.has_frozen_images
    assert "image_encoder" in report_text(list(counts.values()))
    with pytest.raises(TrainingError, match="frozen image encoder"):
        open_cache(step, "anywhere", "fp32")


def test_a_model_without_encoder_is_refused():
    with pytest.raises(TrainingError, match="no encoder"):
        prepare_model(ModelArgs(name="sam-vit-pico", tokenizer=str(TOKENIZER)))
    with pytest.raises(TrainingError, match="tokenizer is not set"):
        prepare_model(ModelArgs(name=PICO["sam"]))


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for again in (False, True):
        step = make_step("efficient_sam")
        step.model.encoder.gradient_checkpointing = again
        step(*BatchInputs(step)(make_batch(step))).sum().backward()
        gradients.append({name: p.grad for name, p in step.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


# LoRA


def train_a_little(step, steps=2, rate=1e-2):
    optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=rate)
    batch = make_batch(step)
    for _ in range(steps):
        optimizer.zero_grad()
        step(*BatchInputs(step)(batch)).sum().backward()
        optimizer.step()
    return step(*BatchInputs(step)(batch)).detach()


def test_lora_trains_little_and_is_merged_when_saved(tmp_path):
    def fresh():
        model = pico_model("efficient_sam")
        choose_trained(model, ModelArgs(lora_rank=4))
        before = sum(p.numel() for p in model.encoder.parameters())
        add_lora(model, 4, 8.0, partial(leave_out_idle, model))
        trained = sum(p.numel() for p in model.encoder.parameters() if p.requires_grad)
        assert 0 < trained < before / 10
        return TrainingStep(model.train(), LossArgs())

    step = fresh()
    plain = TrainingStep(pico_model("efficient_sam"), LossArgs())
    batch = make_batch(plain)
    assert torch.allclose(step(*BatchInputs(step)(batch)), plain(*BatchInputs(plain)(batch)))  # updates begin at zero
    after = train_a_little(step)
    tensors = {name: tensor.detach() for name, tensor in step.state_dict().items()}
    save_model(step.model, tmp_path, TOKENIZER, model_tensors(step.model, tensors))
    merged = TrainingStep(load_model(tmp_path), LossArgs())
    assert torch.allclose(merged(*BatchInputs(merged)(batch)), after, atol=1e-5)
    extra = lora_tensors(tensors)
    assert extra
    resumed = fresh()
    restore(resumed, tmp_path, extra)
    assert torch.allclose(resumed(*BatchInputs(resumed)(batch)), after, atol=1e-6)


def test_restore_refuses_another_architecture(tmp_path):
    save_model(pico_model("sam"), tmp_path)
    with pytest.raises(CheckpointError):
        restore(make_step("sam2"), tmp_path, {})


# feature cache


@pytest.mark.parametrize("family", sorted(PICO))
def test_cached_features_give_the_same_losses(family, tmp_path):
    step = make_step(family)
    cache = open_cache(step, str(tmp_path), "fp32")
    inputs = BatchInputs(step, cache)
    cold = make_batch(step, cache=cache)
    assert len(cold.pixels) == 2
    first = step(*inputs(cold))
    warm = make_batch(step, cache=cache)
    assert len(warm.pixels) == 0 and all(warm.features)
    assert torch.equal(step(*inputs(warm)), first)
    mixed = make_batch(step, make_samples(3), cache)
    assert len(mixed.pixels) == 1 and torch.allclose(step(*inputs(mixed))[: len(first)], first, atol=1e-5)
    exact = step(*BatchInputs(step)(make_batch(step)))
    assert torch.allclose(first, exact, atol=2e-2)


def test_the_cache_goes_by_pixels_and_weights(tmp_path):
    step = make_step("sam")
    cache = open_cache(step, str(tmp_path), "fp32")
    image = make_picture()
    assert name_of(image) != name_of(image[:, ::-1]) and name_of(image[:60]) != name_of(
        image.reshape(60, 320, 3)[:, :160]
    )
    digest = feature_digest(step.model, "fp32")
    assert digest != feature_digest(step.model, "bf16")
    with torch.no_grad():
        next(iter(step.model.segmenter.image_encoder.parameters())).add_(1e-3)
    assert digest != feature_digest(step.model, "fp32")
    with torch.no_grad():
        step.model.projector.fc1.weight.add_(1)
    name = name_of(image)
    cache.write(name, {"embedding": torch.zeros(2, 3)})
    cache.path(name).write_bytes(cache.path(name).read_bytes()[:20])
    with pytest.raises(TrainingError, match="damaged"):
        cache.read(name)


# engine


def test_an_update_that_is_not_finite_changes_nothing():
    step = make_step("sam")
    settings = OptimizerSettings(optimizer_groups(step, OptimArgs()), (0.9, 0.999), 1.0, "fp32")
    engine = AccelerateEngine(step, settings, torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in step.named_parameters()}
    inputs = BatchInputs(step)(make_batch(step))
    engine.accumulate(inputs, lambda losses: losses.sum() * float("nan"), True)
    assert not np.isfinite(engine.update(1.0))
    assert all(torch.equal(p, before[name]) for name, p in step.named_parameters())
    engine.accumulate(inputs, lambda losses: losses.sum(), True)
    assert np.isfinite(engine.update(1.0))
    assert not torch.equal(step.model.projector.fc1.weight, before["model.projector.fc1.weight"])


def test_loading_keeps_moments_but_not_rates():
    def engine(rate, decay):
        step = make_step("sam")
        args = OptimArgs(lr=rate, weight_decay=decay)
        settings = OptimizerSettings(optimizer_groups(step, args), (0.9, 0.999), 1.0, "fp32")
        return AccelerateEngine(step, settings, torch.device("cpu"))

    first = engine(1e-3, 0.1)
    first.accumulate(BatchInputs(first.module)(make_batch(first.module)), lambda losses: losses.sum(), True)
    first.update(0.5)
    second = engine(5e-5, 0.3)
    second.load_optimizer_state(first.optimizer_state())
    second.update(1.0)
    assert {group["lr"] for group in second.optimizer.param_groups} == {5e-5}
    assert {group["weight_decay"] for group in second.optimizer.param_groups} == {0.0, 0.3}
    moments = [
        engine.optimizer.state[engine.module.model.projector.fc1.weight]["exp_avg"] for engine in (first, second)
    ]
    assert moments[0].abs().sum() > 0 and torch.equal(*moments)


def test_fp16_on_a_cpu_is_refused():
    step = make_step("sam")
    with pytest.raises(TrainingError, match="fp16 needs a GPU"):
        AccelerateEngine(step, OptimizerSettings([], (0.9, 0.999), 1.0, "fp16"), torch.device("cpu"))


def test_the_cache_needs_a_whole_encoder():
    step = make_step("sam")
    for strategy in (
        {"kind": "fsdp", "unit": "Layer"},
        {"kind": "deepspeed", "config": {"zero_optimization": {"stage": 3}}},
    ):
        with pytest.raises(TrainingError, match="feature_cache"):
            open_cache(step, "anywhere", "fp32", strategy)


def test_groups_of_the_optimizer():
    step = make_step("sam")
    groups = optimizer_groups(step, OptimArgs(lr=1e-3, encoder_lr_scale=0.5, weight_decay=0.1))
    named = {id(p): name for name, p in step.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            is_encoder = named[id(parameter)].startswith("model.encoder.")
            assert group["lr"] == (5e-4 if is_encoder else 1e-3)
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in step.parameters())


def test_strategies_say_what_they_need():
    step, settings = make_step("sam"), OptimizerSettings([], (0.9, 0.999), 0.0, "fp32")
    with pytest.raises(TrainingError, match="torchrun"):
        build_engine(step, settings, torch.device("cpu"), {"kind": "fsdp", "unit": "Layer"})
    with pytest.raises(TrainingError, match="needed are a kind"):
        build_engine(step, settings, torch.device("cpu"), {"kind": "ddp", "stage": 2})


def test_schedule():
    linear = Schedule("linear", 10, 110)
    factors = [linear.factor(step) for step in range(110)]
    assert factors[0] == pytest.approx(1 / 11) and max(factors) == factors[10] == 1
    assert (np.diff(factors[10:]) < 0).all() and factors[-1] == pytest.approx(0.01)
    assert Schedule("cosine", 0, 100).factor(50) == pytest.approx(0.5)
    assert Schedule("constant", 5, 100).factor(99) == 1


# data


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return write_own(tmp_path_factory.mktemp("own"))


def test_the_same_position_is_the_same_sample(own):
    dataset = open_dataset("own.jsonl", own)
    streams = [Mixture([Group((dataset,))], phrases=2, seed=3) for _ in range(2)]
    for position in (0, 5, 1000, 5):
        one, other = (stream[position] for stream in streams)
        assert one.ids == other.ids and np.array_equal(one.image, other.image) and len(one.phrases) == 2
    other_seed = Mixture([Group((dataset,))], phrases=2, seed=4)
    assert [streams[0][i].ids for i in range(8)] != [other_seed[i].ids for i in range(8)]


def test_rates_are_kept(own, tmp_path):
    first = open_dataset("own.jsonl", own)
    second = open_dataset("own.jsonl", write_own(tmp_path, 2, 1))
    stream = Mixture([Group((first,), 1), Group((second,), 3)], seed=0)
    drawn = [stream.choose(i)[0] is second for i in range(2000)]
    assert 0.71 < np.mean(drawn) < 0.79
    groups = [Group((first,), 1), Group((second,), 3)]
    with pytest.raises(DataError, match="whole multiple"):
        Mixture([Group((first,), 1), Group((second,), 1.5)], sampling="shuffle")
    shuffled = Mixture(groups, sampling="shuffle", seed=1)
    assert shuffled.pass_length == 6 + 3 * 2
    for epoch in range(2):
        places = [shuffled.choose(epoch * 12 + i) for i in range(12)]
        counts = {(d is second, i): 0 for d, i, *_ in places}
        for dataset, index, *_ in places:
            counts[dataset is second, index] += 1
        assert sorted(counts.values()) == [1] * 6 + [3] * 2
    orders = [[shuffled.choose(e * 12 + i)[1] for i in range(12)] for e in range(2)]
    assert orders[0] != orders[1]


def test_ranks_and_accumulation_share_the_same_steps():
    one = Shares(batch=2, forwards=2, rank=0, world=1).positions(3, 5)
    two = [Shares(batch=2, forwards=1, rank=rank, world=2).positions(3, 5) for rank in range(2)]
    for step in range(2):
        alone = sorted(np.ravel(one[2 * step : 2 * step + 2]).tolist())
        shared = sorted(two[0][step] + two[1][step])
        assert alone == shared == list(range((3 + step) * 4, (4 + step) * 4))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_image_is_an_error_that_names_it(own, tmp_path, workers):
    folder = write_own(tmp_path, 3)
    dataset = open_dataset("own.jsonl", folder)
    (folder / "1.png").unlink()
    step = make_step("sam")
    collate = Collate(step.spec, step.model.encoder.image_spec, PhraseTokenizer(TOKENIZER))
    stream = Mixture([Group((dataset,))], sampling="shuffle")
    with pytest.raises(DataError, match=r"1\.png"):
        list(training_steps(stream, collate, Shares(1, 1, 0, 1), 0, 3, workers))
    left = open_dataset("own.jsonl", folder, skip_missing=True)
    stream = Mixture([Group((left,))], sampling="shuffle")
    assert len(list(training_steps(stream, collate, Shares(1, 1, 0, 1), 0, 4, workers))) == 4


def test_spread():
    assert spread(range(5), None) == [0, 1, 2, 3, 4] == spread(range(5), 9)
    assert spread(range(10), 4) == [0, 3, 6, 9]


# configuration


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_can_be_read(path):
    config = read_config(TrainConfig, path)
    assert from_values(TrainConfig, to_values(config), "again") == config
    import yaml

    assert yaml.safe_load(to_yaml(config)) == to_values(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optm": {}}, "Did you mean 'optim'"),
        ({"optim": {"lrr": 1}}, "Did you mean 'lr'"),
        ({"optim": {"steps": 1.5}}, "whole number"),
        ({"optim": {"lr": -1}}, "positive"),
        ({"optim": {"betas": [0.9]}}, "list of 2"),
        ({"data": {"sampling": "all"}}, "random, shuffle"),
        ({"data": {"sets": ["a", "b"], "rates": [1]}}, "Give one for each"),
        ({"loss": {"bce": 0, "dice": 0}}, "every weight of loss is 0"),
        ({"model": {"checkpoint": "a", "encoder_checkpoint": "b"}}, "one or the other"),
        ({"dry_run": 1}, "true or false"),
        ([], "keys and values"),
    ],
)
def test_bad_configurations(values, message):
    with pytest.raises(TrainingError, match=message):
        from_values(TrainConfig, values, "f.yaml")


def test_numbers_without_a_point_are_numbers():
    assert from_values(TrainConfig, {"optim": {"lr": "1e-4"}}, "f").optim.lr == 1e-4


def test_accumulation():
    data = DataArgs(batch_size=4)
    assert accumulation(data, OptimArgs(), 2) == 1
    assert accumulation(data, OptimArgs(global_batch=32), 2) == 4
    with pytest.raises(TrainingError, match="Nearest: 8"):
        accumulation(data, OptimArgs(global_batch=12), 2)


# the folder of a run


def test_run_folder(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.find("auto") is None is folder.find("never")
    for step in (5, 10, 15):
        folder.begin(step)
        write_state(folder.partial(step), {"step": step})
        folder.commit(step)
    folder.begin(20)  # killed in the middle
    (folder.partial(20) / "model.safetensors").write_text("half")
    assert folder.steps() == [5, 10, 15] and folder.find("auto") == folder.checkpoint(15)
    assert read_state(folder.find("auto")) == {"step": 15}
    folder.keep(2)
    assert folder.steps() == [10, 15] and not folder.partial(20).exists()
    with pytest.raises(TrainingError, match="up to step 15"):
        folder.find("never")
    with pytest.raises(TrainingError, match="no checkpoint"):
        folder.find(str(tmp_path))
    with pytest.raises(TrainingError, match="newer checkpoint, of step 15"):
        folder.find(str(folder.checkpoint(10)))
    assert folder.find(str(folder.checkpoint(15))) == folder.checkpoint(15)
    (folder.checkpoint(15) / "training.pt").write_bytes(b"PK")
    with pytest.raises(TrainingError, match="damaged"):
        read_state(folder.checkpoint(15))


def test_other_settings_are_said(tmp_path, caplog):
    folder = RunFolder(tmp_path)
    folder.write_config("lr: 1\nsteps: 5\n")
    folder.write_config("lr: 2\nsteps: 5\n")
    assert not caplog.text  # nothing to go on from
    folder.begin(1)
    folder.commit(1)
    folder.write_config("lr: 3\nsteps: 5\n")
    assert "other settings than before: lr: 3" in caplog.text and "steps" not in caplog.text


def test_best_survives_a_kill_between_its_renames(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2):
        folder.begin(step)
        (folder.partial(step) / "model.safetensors").write_text(str(step))
        write_state(folder.partial(step), {})
        folder.commit(step)
        folder.set_best(folder.checkpoint(step))
        assert (folder.best / "model.safetensors").read_text() == str(step)
        assert not (folder.best / "training.pt").exists()
    folder.best.rename(folder.best.with_name(".best.old"))
    folder.recover()
    assert (folder.best / "model.safetensors").read_text() == "2"


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().dry_run = True
