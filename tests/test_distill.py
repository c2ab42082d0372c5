"""Distillation: folders of images, the stream, the step, the teacher's cache, and train.py as a user runs it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from configs.segmenter_training import DistillArgs
from configs.training import DataArgs, LossArgs, ModelArgs, TrainConfig, ValidationArgs
from datasets.images import ImageCollate, ImageFolder, ImageSample, Mirror, Stream, hold_out, open_image_stream
from datasets.mixture import Shares, training_steps
from model import load_predictor
from model.checkpoints.load import build_model, load_model, save_model
from model.distill_step import DistillStep, Teacher, load_teacher, prepare_student, take_decoder
from model.everything import MaskGenerator
from model.registry import model_config
from tests.conftest import PICO, make_picture
from tests.train_command import curve, records, train, train_processes
from utils.embedding_validation import EmbeddingValidation, draw_sheet, principal_colours, summarise
from utils.engine import AccelerateEngine, OptimizerSettings
from utils.errors import DataError, ImageError, ModelError, TrainingError
from utils.image import read_image
from utils.run_folder import RunFolder

SEGMENTERS = {
    family: name.removeprefix("evf-").removesuffix("-pico") if family != "sam" else "sam-vit-pico"
    for family, name in PICO.items()
}
STUDENT = "efficientvit-sam-pico"


def segmenter(name, seed=0):
    torch.manual_seed(seed)
    return build_model(model_config(name))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder with ten images in it and below it, of several sizes."""
    root = tmp_path_factory.mktemp("images")
    (root / "photos" / "more").mkdir(parents=True)
    for i in range(10):
        image = np.roll(make_picture()[: 100 + 2 * i : 1, : 128 + 3 * i], 13 * i, axis=1)
        Image.fromarray(image).save(root / "photos" / ("more" if i % 3 == 0 else "") / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Return a folder of a SAM of random weights."""
    folder = tmp_path_factory.mktemp("teacher")
    save_model(segmenter("sam-vit-pico", 3), folder)
    return folder


def config(root, teacher, **data):
    return TrainConfig(
        model=ModelArgs(name=STUDENT),
        data=DataArgs(root=str(root), sets=("photos",), workers=0, **data),
        distill=DistillArgs(teacher=str(teacher)),
    )


# folders of images, and streams


def test_a_folder_is_searched_all_the_way_down(images, tmp_path):
    folder = ImageFolder("photos", images / "photos")
    assert len(folder) == 10 and sorted(folder.paths) == folder.paths
    sample = folder.load(3)
    path = images / "photos" / folder.paths[3]
    assert np.array_equal(sample.image, read_image(path)) and sample.key == f"photos/{folder.paths[3]}"
    (tmp_path / "sub").mkdir()
    Image.fromarray(make_picture()).save(tmp_path / "sub" / "A.JPG")
    (tmp_path / "sub" / "._A.JPG").write_bytes(b"what another system leaves")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    assert ImageFolder("x", tmp_path).paths == ["sub/A.JPG"]


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        ImageFolder("x", tmp_path / "none")
    with pytest.raises(DataError, match="holds no image"):
        ImageFolder("x", tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    with pytest.raises(ImageError, match=r"broken\.png"):
        ImageFolder("x", tmp_path).load(0)
    with pytest.raises(DataError, match="1 are held out"):
        hold_out(ImageFolder("x", tmp_path), 0.01, at_end=False)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_also_by_a_worker(workers, images, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    stream = Stream([ImageFolder("x", tmp_path)], Mirror(0))
    collate = ImageCollate(*[segmenter(STUDENT).segmenter.own_image_spec] * 2)
    with pytest.raises(ImageError, match=r"broken\.png"):
        list(training_steps(stream, collate, Shares(1, 1, 0, 1), 0, 1, workers))


class Numbers:
    """Stands for a data set: its items are (name, index)."""

    def __init__(self, name, count, in_order=False):
        self.name, self.count, self.in_order = name, count, in_order

    def __len__(self):
        return self.count

    def load(self, index):
        return self.name, index


def test_every_item_comes_once_before_any_comes_again():
    sets = [Numbers("a", 5), Numbers("s", 7, True), Numbers("b", 3), Numbers("t", 4, True)]
    stream = Stream(sets, lambda item, generator: (item, generator.random()), seed=4)
    everything = sorted((one.name, i) for one in sets for i in range(one.count))
    passes = [[stream[19 * epoch + i][0] for i in range(19)] for epoch in range(3)]
    for one in passes:
        assert sorted(one) == everything
        for name in ("s", "t"):  # in order, and without anything in between
            places = [place for place, item in enumerate(one) if item[0] == name]
            assert [one[place][1] for place in places] == list(range(len(places)))
            assert places == list(range(places[0], places[0] + len(places)))
    assert passes[0] != passes[1] and stream[3] == stream[3] and stream[3][1] != stream[22][1]
    with pytest.raises(DataError, match="is empty"):
        Stream([Numbers("none", 0)], None)


def test_what_is_held_out_is_not_trained_on(images, teacher):
    stream = open_image_stream(config(images, teacher, held_out=0.2))
    trained = {stream[i].key for i in range(stream.pass_length)}
    (measured,) = stream.measured
    held = {measured.load(i).key for i in range(len(measured))}
    assert len(trained) == 8 and len(held) == 2 and not trained & held
    assert [measured.load(i).index for i in range(2)] == [0, 1]
    assert "8" in stream.describe() and "measured" in stream.describe()
    at_end = hold_out(ImageFolder("photos", images / "photos"), 0.3, at_end=True)[1]
    assert list(at_end.indices) == [7, 8, 9]
    named = replace(config(images, teacher), val=ValidationArgs(sets=("photos/more",), max_images=2))
    stream = open_image_stream(named)
    assert stream.pass_length == 10 and len(stream.measured[0]) == 2


def test_mirrored_images():
    sample = ImageSample(make_picture(), "x", 0)
    rng = np.random.default_rng(0)
    assert np.array_equal(Mirror(1.0)(sample, rng).image, sample.image[:, ::-1])
    assert Mirror(0.0)(sample, rng) is sample


# the step


def test_columns_are_what_they_say():
    torch.manual_seed(0)
    student, target = torch.randn(2, 256, 4, 4, dtype=torch.float64), torch.randn(2, 256, 4, 4, dtype=torch.float64)
    found = DistillStep.compare(student, target)
    for row, one, other in zip(found, student.numpy(), target.numpy(), strict=True):
        cosines = [
            one[:, y, x] @ other[:, y, x] / np.linalg.norm(one[:, y, x]) / np.linalg.norm(other[:, y, x])
            for y in range(4)
            for x in range(4)
        ]
        expected = [((one - other) ** 2).mean(), np.linalg.norm(one - other) / np.linalg.norm(other), np.mean(cosines)]
        assert np.allclose(row.numpy(), expected)
    same = DistillStep.compare(target, target)
    assert torch.allclose(same, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand(2, 3))


def test_a_target_of_another_grid_is_resized():
    target, embedding = torch.rand(1, 256, 8, 8), torch.zeros(1, 256, 4, 4)
    assert torch.allclose(DistillStep.fit_grid(torch.ones(1, 256, 8, 8), embedding), torch.ones(1, 256, 4, 4))
    grown = DistillStep.fit_grid(target, torch.zeros(1, 256, 16, 16))
    assert torch.allclose(grown, F.interpolate(target, (16, 16), mode="bilinear"), atol=1e-6)
    with pytest.raises(ModelError, match="128 channels"):
        DistillStep.fit_grid(target[:, :128], embedding)


@pytest.mark.parametrize("family", sorted(SEGMENTERS))
def test_any_segmenter_teaches_any(family):
    """Each family as student and as teacher; what is trained gets a gradient and nothing else does."""
    student, master = segmenter(SEGMENTERS[family]), segmenter(SEGMENTERS[family], 1)
    prepare_student(student)
    for model in (master, segmenter("sam-vit-pico", 1)):
        teacher = Teacher(model, student.segmenter.own_image_spec, "fp32")
        collate = ImageCollate(student.segmenter.own_image_spec, teacher.spec)
        batch = collate([ImageSample(make_picture(), "x", 0), ImageSample(make_picture()[:, 40:], "y", 1)])
        step = DistillStep(student).train()
        losses = step(*teacher(batch))
        assert losses.shape == (2, 3) and losses.isfinite().all()
        step.zero_grad()
        losses[:, 0].sum().backward()
        for name, parameter in step.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
    assert {student.segmenter.part_of(n) for n, p in student.segmenter.named_parameters() if p.requires_grad} == {
        "image_encoder"
    }


def test_the_teacher_sees_what_the_student_sees():
    """A square teacher of a letterboxed student is shown letterboxed images: else their places would differ."""
    student = segmenter(STUDENT)
    teacher = Teacher(segmenter("sam2-hiera-pico"), student.segmenter.own_image_spec, "fp32")
    assert teacher.spec.resize == "letterbox" and teacher.model.segmenter.own_image_spec.resize == "square"
    image = np.full((50, 100, 3), 200, np.uint8)
    for spec in (student.segmenter.own_image_spec, teacher.spec):
        assert not spec(image)[:, spec.size // 2 :].any() and spec(image)[:, : spec.size // 2].all()


def test_the_decoder_of_the_teacher_is_taken_where_it_fits(caplog):
    student, master = segmenter(STUDENT), segmenter("sam-vit-pico", 1)
    before = {name: tensor.clone() for name, tensor in student.segmenter.state_dict().items()}
    assert not take_decoder(student, segmenter("efficient-sam-pico")) and "do not fit" in caplog.text
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.segmenter.state_dict().items())
    assert take_decoder(student, master)
    theirs = master.segmenter.state_dict()
    for name, tensor in student.segmenter.state_dict().items():
        is_image = student.segmenter.part_of(name) == "image_encoder"
        assert torch.equal(tensor, before[name] if is_image else theirs[name]), name


def test_of_a_sam2_is_taken_what_sam_has_too():
    """The two-way transformer of both then says the same; object token and fine levels stay behind."""
    student, master = segmenter(STUDENT), segmenter("sam2-hiera-pico", 1)
    assert take_decoder(student, master)
    ours, theirs = student.segmenter.mask_decoder, master.segmenter.sam2.mask_decoder
    given = {
        "point_embeddings": torch.randn(1, 1, 5, 256),
        "image_embeddings": torch.randn(1, 256, 4, 4),
        "image_positional_embeddings": torch.randn(1, 256, 4, 4),
        "attention_similarity": None,
    }
    with torch.no_grad():
        for own, other in zip(ours.transformer(**given), theirs.transformer(**given), strict=True):
            assert torch.allclose(own, other, atol=1e-5)
    for part in ("upscale_conv1", "upscale_conv2", "mask_tokens", "iou_token"):
        assert torch.equal(getattr(ours, part).weight, getattr(theirs, part).weight), part
    points = torch.cat([one.weight for one in student.segmenter.prompt_encoder.point_embed])
    assert torch.equal(points, master.segmenter.sam2.prompt_encoder.point_embed.weight)


def test_a_student_with_phrases_is_refused():
    with pytest.raises(ModelError, match=r"--model\.name efficientvit-sam-pico"):
        prepare_student(segmenter(PICO["efficientvit_sam"]))


def test_a_cache_spares_the_teacher(images, teacher, tmp_path):
    student = segmenter(STUDENT)
    args = DistillArgs(teacher=str(teacher))
    cached = load_teacher(args, student, "fp32", str(tmp_path))
    plain = load_teacher(args, student, "fp32", None)
    spec = student.segmenter.own_image_spec
    folder = ImageFolder("photos", images / "photos")
    samples = [folder.load(i) for i in range(3)]
    fresh = cached.targets(ImageCollate(spec, cached.spec, cached.cache)(samples[:2]))
    assert torch.allclose(
        fresh.float(), plain.targets(ImageCollate(spec, plain.spec)(samples[:2])), rtol=8e-3, atol=1e-3
    )
    batch = ImageCollate(spec, cached.spec, cached.cache)(samples[1:])  # one known, one not
    assert len(batch.teacher_pixels) == 1
    assert torch.equal(cached.targets(batch)[0], fresh[1])
    cached.model = None  # everything is known now
    again = cached.targets(ImageCollate(spec, cached.spec, cached.cache)(samples))
    assert torch.equal(again[:2], fresh)
    other = load_teacher(args, student, "bf16", str(tmp_path))
    assert other.cache.folder != cached.cache.folder
    assert other.cache.read(batch.feature_names[0]) is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"prompts": {"masks": 4}}, "ask for different trainings"),
        ({"data": {"clip_frames": 4}}, "ask for different trainings"),
        ({"data": {"stray_words": 0.5}}, "data.stray_words: not read where distill.teacher"),
        ({"model": {"lora_rank": 4, "phrases_from": "x"}}, "model.phrases_from and model.lora_rank"),
        ({"loss": {"bce": 2}}, "minimises the squared error"),
        ({"distill": {"teacher_checkpoint": "x"}}, "Give its name too"),
        ({"data": {"held_out": 0.9}}, "from 0 to 0.5"),
        ({"optim": {"clip_value": -1}}, "optim.clip_value"),
    ],
)
def test_options_that_do_not_fit(change, text):
    from configs.nested import from_values

    values = {"distill": {"teacher": "x"}} | change
    with pytest.raises(TrainingError, match=text):
        from_values(TrainConfig, values, "f.yaml")


def test_the_default_loss_is_not_asked_for():
    assert TrainConfig(distill=DistillArgs(teacher="x")).terms() == {"mse": 1.0, "relative": 0.0, "cosine": 0.0}
    assert TrainConfig(loss=LossArgs(iou=1)).terms() == {"bce": 1.0, "dice": 1.0, "iou": 1.0}


# clipping by value


def test_gradients_are_clipped_by_value():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 1, bias=False)
    groups = [{"params": [layer.weight], "lr": 0.0, "weight_decay": 0.0}]
    settings = OptimizerSettings(groups, (0.9, 0.999), 0.0, "fp32", clip_value=2.0)
    engine = AccelerateEngine(layer, settings, torch.device("cpu"))
    engine.accumulate((torch.tensor([[1.0, -30.0, 2.5]]),), lambda output: output.sum(), True)
    seen = []
    step = engine._optimizer.step
    engine._optimizer.step = lambda: (seen.append(layer.weight.grad.clone()), step())
    assert engine.update(1.0) == pytest.approx(np.sqrt(1 + 900 + 6.25))
    assert seen[0].tolist() == [[1.0, -2.0, 2.0]]


# what is measured


def test_explained_variance_is_that_of_all_places():
    rng = np.random.default_rng(0)
    target, student = rng.normal(2, 3, (4, 256, 5, 5)), rng.normal(2, 3, (4, 256, 5, 5))

    class Module(torch.nn.Module):
        compare, fit_grid = staticmethod(DistillStep.compare), staticmethod(DistillStep.fit_grid)

        def embed(self, pixels):
            return torch.from_numpy(student)

    class Batch:
        indices = range(4)

    measure = EmbeddingValidation(lambda batch: (None, torch.from_numpy(target)), {}, None, None)
    found = summarise(measure.rows(Module(), Batch()))
    error = ((target - student) ** 2).mean()
    variance = target.var(axis=(0, 2, 3)).mean()
    assert found["mse"] == pytest.approx(error, rel=1e-4)
    assert found["explained"] == pytest.approx(1 - error / variance, rel=1e-3)


def test_colours_are_the_main_directions():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:8, :8]
    axes = np.linalg.qr(rng.normal(size=(16, 3)))[0]
    embedding = np.einsum("kc,chw->khw", axes, np.stack([x * 9.0, y * 3.0, (x + y) % 2])) + 5
    painted = principal_colours(embedding.reshape(16, -1).T)(embedding)
    assert painted.shape == (8, 8, 3) and painted.dtype == np.uint8
    assert abs(np.corrcoef(painted[..., 0].ravel(), x.ravel())[0, 1]) > 0.99
    assert abs(np.corrcoef(painted[..., 1].ravel(), y.ravel())[0, 1]) > 0.99
    sheet = draw_sheet([(make_picture(), embedding, embedding)] * 2)
    assert sheet.shape == (384, 576, 3) and np.array_equal(sheet[:, 192:384], sheet[:, 384:])


# train.py


def options(images, teacher, out, batch=2, steps=6):
    return [
        "--model.name", STUDENT, "--distill.teacher", teacher, "--data.root", images, "--data.sets", "photos",
        "--data.held_out", "0.2", "--data.workers", "0", "--data.batch_size", batch, "--optim.steps", steps,
        "--optim.lr", "3e-3", "--optim.warmup", "1", "--optim.global_batch", 2, "--run.out", out,
        "--run.log_every", "1", "--run.device", "cpu", "--data.feature_cache", f"{out}_features",
        "--val.every", 3, "--run.seed", 1,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def reference(images, teacher, tmp_path_factory):
    """Return the folder of a whole run."""
    out = tmp_path_factory.mktemp("run") / "whole"
    done = train_processes(*options(images, teacher, out))
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_run_learns_and_can_be_prompted(reference, teacher):
    out, done = reference
    losses = curve(out)[:, 0]
    assert losses[-1] < 0.6 * losses[0]
    first, last = records(out, "val")
    assert last["explained"] > first["explained"] and last["mse"] < first["mse"] and -1 <= last["cosine"] <= 1
    assert "image_encoder" in done.stderr and "measured" in done.stderr
    assert read_image(out / "pictures" / "held_out" / "step_00000006.png").shape == (2 * 192, 3 * 192, 3)
    model, master = load_model(out / "best"), load_model(teacher)
    decoder = model.segmenter.mask_decoder.state_dict()
    assert all(torch.equal(decoder[n], t) for n, t in master.segmenter.mask_decoder.state_dict().items())
    predictor = load_predictor(out / "best", "cpu")
    predictor.set_image(make_picture())
    assert predictor.predict(boxes=[10, 10, 90, 60]).masks.shape == (1, 120, 160)
    found = MaskGenerator(predictor, points_per_side=2, pred_iou_thresh=0, stability_score_thresh=0)
    assert isinstance(found.generate(make_picture()), list)


def test_it_goes_on_as_if_it_had_never_stopped(images, teacher, tmp_path):
    out = tmp_path / "cut"
    for steps in (3, 6):  # a constant rate: the number of steps says nothing of the first ones
        assert train(*options(images, teacher, out, steps=steps), "--optim.schedule", "constant") == 0
    whole = tmp_path / "whole"
    assert train(*options(images, teacher, whole), "--optim.schedule", "constant") == 0
    assert np.array_equal(curve(out), curve(whole))
    mine, theirs = (load_file(RunFolder(run).checkpoint(6) / "model.safetensors") for run in (out, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(images, teacher, tmp_path):
    """Batch norm learns from each forward: one process that adds up two sees what two processes see."""
    alone, two = tmp_path / "alone", tmp_path / "two"
    assert train(*options(images, teacher, alone, batch=1)) == 0
    done = train_processes(*options(images, teacher, two, batch=1), ranks=2)
    assert done.returncode == 0, done.stderr
    assert np.abs(curve(two) - curve(alone)).max() < 1e-5
    assert len(list((tmp_path / "two_features").rglob("*.safetensors"))) == 10
