"""Dump a teacher's image embeddings as Open-Vocabulary SAM's training reads them: a file for each image, in one folder.

python -m tools.dump_features --teacher sam_vit_h_4b8939.pth --images sa1b/sa_000000 --output data/sam_feat
"""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from configs.cli import parse
from utils.errors import DataError, run_main


@dataclass(frozen=True)
class Args:
    """Dump a teacher's image embeddings: for each image IMAGE_vit_h_cache.pth, a bare float32 tensor."""

    teacher: str
    """Segmenter whose embeddings are kept: a weights file, a folder, or a registry name."""
    images: tuple[Path, ...]
    """Folders of images, searched all the way down. No two images may have the same name."""
    output: Path
    """Folder of the files; those that are there are kept."""
    batch_size: int = 1
    device: str | None = None
    """cpu, cuda or mps; by default CUDA, then MPS, then the CPU."""


def main() -> int:
    """Embed what is missing."""
    args = parse(Args, "tools/dump_features.py")
    if args.batch_size < 1:
        raise DataError(f"--batch_size {args.batch_size}: needed is at least 1")
    import torch
    from tqdm import tqdm

    from datasets.images import ImageFolder, check_stems
    from model.checkpoints.load import load_model
    from model.distill_step import Teacher
    from utils.feature_cache import FlatFeatures
    from utils.image import ImageSpec
    from utils.precision import choose_device

    folders = [ImageFolder(str(folder), folder) for folder in args.images]
    check_stems(folders)
    features, device = FlatFeatures(args.output), choose_device(args.device)
    model = load_model(args.teacher, device=device, dtype=torch.float32)
    teacher = Teacher(model, ImageSpec(model.segmenter.own_image_spec.size, "letterbox"), "fp32")
    missing = [
        (folder, index)
        for folder in folders
        for index, path in enumerate(folder.paths)
        if not features.path(Path(path).stem).is_file()
    ]
    waiting = iter(tqdm(missing, unit="image"))
    while batch := list(islice(waiting, args.batch_size)):
        samples = [folder.load(index) for folder, index in batch]
        pixels = torch.stack([teacher.spec(sample.image) for sample in samples]).to(device)
        for sample, embedding in zip(samples, teacher.embed(pixels), strict=True):
            features.write(features.name(sample.image, sample.key), {"embedding": embedding})
    return 0


if __name__ == "__main__":
    run_main(main)
