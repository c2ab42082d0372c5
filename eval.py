"""Measure a model: `torchrun --nproc_per_node 2 eval.py --version FOLDER --val_dataset "refcoco|unc|val"`."""

import sys

from configs.cli import parse
from configs.evaluation import EvalArgs
from utils.errors import run_main


def main() -> int:
    """Parse the options, open the data, load the model, then measure one data set after the other."""
    args = parse(EvalArgs, "eval.py")
    args.check()
    from tqdm import tqdm

    from datasets.collate import Collate
    from datasets.instance_files import open_instances
    from datasets.loading import evaluation_batches, open_measured
    from datasets.mixture import spread
    from datasets.videos import is_video_set, open_video_set
    from model import image_runner, prompted_runner
    from model.video import VideoPredictor
    from utils.distributed import Ranks
    from utils.evaluation_report import Report, WorstCases, find_empty_pixels
    from utils.evaluator import evaluate, gather, gather_results
    from utils.video_evaluator import measure

    ranks = Ranks.from_environment(args.local_rank)
    if args.dataset:
        files = args.annotation_json_file, args.image_root, args.source_json_file
        return prompted_runner.run(args, open_instances(args.dataset, *files, args.max_pixels), ranks)
    if all(map(is_video_set, args.val_dataset)):
        sets = [open_video_set(name, args.dataset_dir) for name in args.val_dataset]
        image = image_runner.load(args.for_loading(), ranks)
        video = VideoPredictor(image.model, image.tokenizer)
        return measure(video, sets, ranks, args.out, args.settings(image.model.config.name, image.model.dtype))
    ranks.join()
    world = (args.reference_world or ranks.world) if args.reference_metric else None
    datasets = open_measured(args, as_published=world is not None)
    predictor = image_runner.load(args.for_loading(), ranks)
    model = predictor.model
    report = Report(args.out, args.settings(model.config.name, model.dtype), several=len(datasets) > 1)
    collate = Collate(predictor.image_spec.for_evaluation(), model.encoder.image_spec, predictor.tokenizer)
    for dataset in datasets:
        empty_pixels = find_empty_pixels(dataset.name, args.empty_pixels)
        indices = spread(dataset, args.max_images)
        worst = WorstCases(empty_pixels=empty_pixels)
        batches = evaluation_batches(dataset, collate, indices, args.batch_size, ranks, args.workers)
        with tqdm(total=len(indices), desc=dataset.name, unit="image", disable=not ranks.is_first) as bar:
            done = evaluate(
                model,
                batches,
                model.device,
                on_batch=worst.add if args.out else None,
                progress=lambda count, bar=bar: bar.update(min(count * ranks.world, bar.total - bar.n)),
            )
        results = gather_results(done, ranks)
        cases = WorstCases.join(gather(worst.cases, ranks))
        if ranks.is_first:
            sys.stdout.write(report.add(dataset, results, cases, empty_pixels, world) + "\n")
            sys.stdout.flush()
    if ranks.is_first:
        sys.stdout.write(report.finish())
    ranks.leave()
    return 0


if __name__ == "__main__":
    run_main(main)
