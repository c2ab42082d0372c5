"""Train a small CLIP, from random weights, on crops of annotated things and short phrases with their names.

python -m tools.train_small_clip --data dataset_names --output nano_clip.pt

The result is what `model.clip_checkpoint` of the first stage of Open-Vocabulary SAM takes (train.py): a state dict as
open_clip has it, with the rows of its table of tokens that were used. A stopped run goes on.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from configs.cli import parse
from utils.errors import DataError, ModelError, TrainingError, run_main

if TYPE_CHECKING:
    from torch import Tensor, nn

    from configs.schema import OVSAMConfig
    from datasets.instances import InstanceSet

SHORT = ("{}", "a {}", "the {}", "a picture of a {}")
"""What is said of a crop, beside the templates of a vocabulary."""
LEAST_AREA = 150
"""Things of fewer pixels are left out."""
WIDER, NARROWER = 1.8, 0.9
"""Sides of a crop, relative to the longer side of the thing in it."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Args:
    """Train a small CLIP, from random weights, on crops of annotated things and short phrases with their names."""

    data: Path
    """Folder with annotations in the layout of COCO; all names are learned, base and novel: CLIP has seen the world."""
    output: Path
    """File to write, .pt; OUTPUT.state beside it is where a stopped run goes on."""
    annotations: str = "annotations/instances_train.json"
    """Below --data."""
    images: str = "images"
    """Below --data."""
    model: str = "ovsam-nano"
    """Model of the ovsam family that it is for."""
    steps: int = 500
    """The learning rate falls to 0 until then; a stopped run may go on with another number."""
    batch_size: int = 64
    """Crops of a step, each of another name: as many as there are names at most."""
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 50
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise TrainingError(f"--{name} {getattr(self, name)}: needed is at least 1")


class Crops:
    """Things of annotated images by name, each a square that a random crop shows.

    Raises:
        DataError: fewer than two names have a thing that is large enough.
    """

    def __init__(self, instances: "InstanceSet", config: "OVSAMConfig") -> None:
        from model.vocabulary import wordings
        from utils.image import ImageSpec, read_image

        self.spec = ImageSpec(size=config.clip_size, resize="square", filter="cv2-linear")
        self.images = [read_image(instances.root / about.path) for _, about, _ in instances.images]
        self.things: dict[str, list[tuple[int, tuple[float, ...]]]] = {}
        for place, asked in enumerate(instances.asked):
            for one in asked:
                if one.area >= LEAST_AREA:
                    name = wordings(instances.names[one.category])[0]
                    self.things.setdefault(name, []).append((place, one.box))
        self.names = sorted(self.things)
        if len(self.names) < 2:
            raise DataError(f"{instances.path} has fewer than two names of things with {LEAST_AREA} pixels")

    def draw(self, generator: np.random.Generator, count: int) -> tuple["Tensor", list[str]]:
        """Return crops float [n, 3, S, S] of as many different names, and phrases for them."""
        import torch

        from model.vocabulary import TEMPLATES

        chosen = generator.permutation(len(self.names))[:count]
        said = (*TEMPLATES, *SHORT * 3)
        phrases = [said[int(generator.integers(len(said)))].format(self.names[i]) for i in chosen]
        return torch.stack([self.spec(self._crop(generator, self.names[i])) for i in chosen]), phrases

    def _crop(self, generator: np.random.Generator, name: str) -> np.ndarray:
        things = self.things[name]
        place, (x, y, width, height) = things[int(generator.integers(len(things)))]
        image = self.images[place]
        side = max(width, height) * generator.uniform(NARROWER, WIDER)
        room = abs(side - max(width, height)) / 2
        centre_x, centre_y = (
            start + length / 2 + generator.uniform(-room, room) for start, length in ((x, width), (y, height))
        )
        left, top = (max(0, round(centre - side / 2)) for centre in (centre_x, centre_y))
        crop = image[top : round(centre_y + side / 2), left : round(centre_x + side / 2)]
        return np.ascontiguousarray(crop[:, ::-1] if generator.random() < 0.5 else crop)


def used_tokens(names: Sequence[str]) -> "Tensor":
    """Return the tokens of everything that is said of names, ascending, with those of padding and the ends."""
    from model.encoders.clip_text import tokenize
    from model.vocabulary import TEMPLATES

    return tokenize([text.format(name) for name in names for text in (*TEMPLATES, *SHORT)]).unique()


def build_clip(config: "OVSAMConfig", words: int) -> "nn.Module":
    """Return open_clip's model of the shapes of an ovsam configuration, with a table of `words` tokens."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=config.depths, width=config.width, image_size=config.clip_size)
    text = CLIPTextCfg(vocab_size=words, width=config.text_width, heads=config.text_heads, layers=config.text_layers)
    return CLIP(config.embed_width, vision, text, quick_gelu=True)


def encode_text(clip: "nn.Module", rows: "Tensor") -> "Tensor":
    """Return unit vectors [N, D] of tokens int64 [N, 77], as open_clip does, but nothing behind the last end."""
    import torch.nn.functional as F

    ends = rows.argmax(1)
    length = int(ends.max()) + 1
    tokens = clip.token_embedding(rows[:, :length]) + clip.positional_embedding[:length]
    tokens = clip.ln_final(clip.transformer(tokens, attn_mask=clip.attn_mask[:length, :length]))
    return F.normalize(tokens[range(len(rows)), ends] @ clip.text_projection, dim=-1)


def train(args: Args, config: "OVSAMConfig", crops: Crops) -> "dict[str, Tensor]":
    """Train, saving the state now and then, and return the tensors to write."""
    import torch
    from open_clip.loss import ClipLoss
    from tqdm import trange

    from model.encoders.clip_text import rows_of, tokenize
    from utils.files import atomic_path

    torch.manual_seed(args.seed)
    word_ids = used_tokens(crops.names)
    model = build_clip(config, len(word_ids)).train()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay)
    state_file, begin = args.output.with_name(args.output.name + ".state"), 0
    settings = {"model": args.model, "batch_size": args.batch_size, "seed": args.seed}
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        if state["settings"] != settings:
            raise TrainingError(f"{state_file} is of a run with {state['settings']}. Delete it, or give its options")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begin = state["step"]
    loss_of = ClipLoss()
    with trange(begin, args.steps, initial=begin, total=args.steps, desc="clip", dynamic_ncols=True) as bar:
        for step in bar:
            pixels, phrases = crops.draw(np.random.default_rng([args.seed, step]), args.batch_size)
            rise = min(1.0, (step + 1) / args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rise * 0.5 * (1 + math.cos(math.pi * step / args.steps))
            seen = model.encode_image(pixels, normalize=True)
            said = encode_text(model, rows_of(tokenize(phrases), word_ids))
            loss = loss_of(seen, said, model.logit_scale.exp())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(100))
            if (step + 1) % 20 == 0:
                right = float(((seen @ said.T).argmax(1) == torch.arange(len(seen))).float().mean())
                bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{right:.2f}")
            if (step + 1) % args.save_every == 0:
                kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                with atomic_path(state_file) as temporary:
                    torch.save(kept | {"settings": settings}, temporary)
    return {**model.state_dict(), "token_embedding.ids": word_ids}


def main() -> int:
    """Read the images, train, write."""
    args = parse(Args, "tools/train_small_clip.py")
    import torch

    from configs.schema import OVSAMConfig
    from datasets.instance_files import open_instances
    from model.registry import model_config
    from utils.files import atomic_path

    config = model_config(args.model).segmenter
    if not isinstance(config, OVSAMConfig):
        raise ModelError(f"--model {args.model} has no CLIP. Take one of the ovsam family, such as ovsam-nano")
    tensors = train(
        args, config, Crops(open_instances("coco", args.data / args.annotations, args.data / args.images), config)
    )
    with atomic_path(args.output) as temporary:
        torch.save(tensors, temporary)
    logger.info("CLIP with %d pieces of words written to %s", len(tensors["token_embedding.ids"]), args.output)
    return 0


if __name__ == "__main__":
    run_main(main)
