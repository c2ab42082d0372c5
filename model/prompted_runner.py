"""The work of `eval.py --dataset coco` and `lvis`: a segmenter measured with points and boxes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from configs.evaluation import EvalArgs
from configs.schema import OVSAMConfig
from utils.distributed import Ranks
from utils.errors import ModelError, TrainingError
from utils.evaluation_report import WorstCases
from utils.evaluator import gather, gather_results, gather_to_first
from utils.instance_metrics import average_precision, in_published_order
from utils.instance_report import heading, precision_text, write_annotations, write_detections
from utils.precision import choose_device, choose_dtype

from .checkpoints.load import fill_model, find_source, resolve
from .image_runner import check_family
from .predictor import ImagePredictor
from .prompted_eval import PromptedEvaluator, found_annotations, mask_detections, measure_annotations, require_prompts


def run(args: EvalArgs, instances: Any, ranks: Ranks) -> int:
    """Measure, print the numbers, and write what `--out` asks for; return the exit status.

    Args:
        instances: a `datasets.instances.InstanceSet`; where it has detections, these are measured.

    Raises:
        TextSAMError: the model takes no such prompts, or a file is damaged.
    """
    ranks.join()
    ask = load(args, ranks, instances)
    if ask.names_masks:
        instances = instances.without_crowds()
    work = _Work(args, instances, ranks, ask, instances.spread(args.max_images))
    text = work.annotations() if instances.detections is None else work.detections()
    if ranks.is_first:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    ranks.leave()
    return 0


def load(args: EvalArgs, ranks: Ranks, instances: Any) -> PromptedEvaluator:
    """Load the segmenter that `--version` names, alone or inside an EVF model, whose encoder is left out.

    Args:
        instances: what is measured; their classes are what Open-Vocabulary SAM names masks by.

    Raises:
        TextSAMError: the checkpoint cannot be used, or takes no such prompts.
    """
    device = choose_device(args.device, ranks.local_rank)
    dtype = choose_dtype("fp32" if args.precision == "auto" else args.precision, device)
    clicks = (args.num_click or 1) if args.prompt_type == "point" else None
    source = resolve(find_source(args.version))
    check_family(args.model_type, args.version, source.config)
    names_masks = isinstance(source.config.segmenter, OVSAMConfig) and args.prompt_type != "box_from_detector"
    check_options(args, names_masks)
    if names_masks:
        from .named_eval import find_classes, open_evaluator  # open_clip and torchvision: others need not wait for them

        classes = find_classes(args, source, instances, device)
    model = fill_model(source, torch.device("cpu"), dtype)
    require_prompts(model, clicks)
    predictor = ImagePredictor(model, None, "evaluation")  # while it has its encoder, which says how images are resized
    model.encoder = None
    model.to(device)
    if args.compile:
        model.segmenter.compile_image_encoder()
    return open_evaluator(args, predictor, classes) if names_masks else PromptedEvaluator(predictor, clicks)


def check_options(args: EvalArgs, names_masks: bool) -> None:
    """Refuse options about names where none are measured, and one that has no bearing where they are.

    Raises:
        ModelError: a model that names nothing. TrainingError: another such option.
    """
    for name in ("vocabulary", "branch", "roi_size", "base", "novel"):
        if getattr(args, name) != getattr(EvalArgs, name) and not names_masks:
            raise ModelError(
                f"--{name} is about names, which {args.version} with --prompt_type {args.prompt_type} does not give. "
                "Take an Open-Vocabulary SAM and boxes or points, or leave it out"
            )
    if names_masks and args.reference_metric and args.num_click not in (None, 1):
        raise TrainingError("--reference_metric: the published evaluation of names has one click, not --num_click")
    if args.reference_world and names_masks:
        raise TrainingError("--reference_world: the published evaluation of names counts no image twice. Leave it out")


@dataclass(frozen=True)
class _Work:
    """What a measurement is made of; `indices`: the images, with those that nothing is asked about."""

    args: EvalArgs
    instances: Any
    ranks: Ranks
    ask: PromptedEvaluator
    indices: list[int]

    def annotations(self) -> str:
        """Measure what was annotated; return what to show, on the first rank."""
        worst = WorstCases()
        with self._batches() as (batches, progress):
            on_batch = worst.add if self.args.out else None
            done = measure_annotations(self.ask, batches, self.instances, on_batch, progress)
        results = gather_results(done, self.ranks)
        cases = WorstCases.join(gather(worst.cases, self.ranks))
        if not self.ranks.is_first:
            return ""
        world = self._world
        means = self.ask.summary(results, len(self.instances), world)
        if self.args.out:
            write_annotations(Path(self.args.out), self._about(), means, results, cases, self.instances)
        return f"{self._heading(means.counts['all'], 'annotations')}\n{means.text()}"

    def detections(self) -> str:
        """Measure the masks of a detector's boxes; return what to show, on the first rank."""
        with self._batches() as (batches, progress):
            done = mask_detections(self.ask, batches, self.instances, progress)
        parts = gather_to_first(done, self.ranks)
        if not self.ranks.is_first:
            return ""
        by_image = sorted((image for part in parts for image in part), key=lambda image: image[0])
        if self._world:
            by_image = in_published_order(by_image, lambda image: image[0], len(self.instances), self._world)
        results = [dict(one) for _, found in by_image for one in found]
        precision = average_precision(self.instances.truth(self.indices), results, self.instances.kind)
        if self.args.out:
            asked = found_annotations(self.instances, self.indices, dict(by_image))
            write_detections(Path(self.args.out), self._about(), precision, results, asked, self.instances.annotated())
        return f"{self._heading(len(results), 'detections')}\n{precision_text(precision)}"

    @contextmanager
    def _batches(self) -> Iterator[tuple[Any, Any]]:
        """Yield this rank's batches, and what is to be told how many images of one are done."""
        asked = [index for index in self.indices if self.instances.count(index)]
        spec, args = self.ask.predictor.image_spec, self.args
        batches = self.instances.batches(spec, asked, args.batch_size, self.ranks, args.workers)
        with tqdm(total=len(asked), desc=self.instances.name, unit="image", disable=not self.ranks.is_first) as bar:
            yield batches, lambda count: bar.update(min(count * self.ranks.world, bar.total - bar.n))

    @property
    def _world(self) -> int | None:
        if self.ask.names_masks or not self.args.reference_metric:
            return None
        return self.args.reference_world or self.ranks.world

    @property
    def _is_whole(self) -> bool:
        return len(self.indices) == len(self.instances)

    def _heading(self, count: int, what: str) -> str:
        counted = f"{count} {what} of {len(self.indices)} images"
        shortfall = "" if self._is_whole else f"of the {len(self.instances)} that there are: NOT the score of the set"
        prompt = self.args.prompt_type
        prompt += " as published" if self.args.reference_metric and self.ask.names_masks else ""
        return heading(self.instances.name, prompt, counted, self._world, shortfall)

    def _about(self) -> dict[str, Any]:
        model = self.ask.model
        found = self.args.settings(model.config.name, model.dtype) | {
            "dataset": self.instances.kind,
            "annotations": str(self.args.annotation_json_file),
            "prompt_type": self.args.prompt_type,
            "num_click": self.ask.clicks,
            "detections": self.args.source_json_file,
            "images": len(self.indices),
            "is_whole": self._is_whole,
        }
        return found | self.ask.about() | ({"processes": self._world} if self._world else {})
