"""Train EVF-SAM: `torchrun --nproc_per_node 2 train.py configs/experiment/NAME.yaml --data.root DIR`."""

import sys
from functools import partial

from configs.cli import parse_with_file
from configs.loader import read_strategy
from configs.nested import to_yaml
from configs.training import TrainConfig, accumulation
from utils.errors import run_main

SIGTERM_STATUS = 143


def main() -> int:
    """Parse the options, then build and train; the status is 143 where SIGTERM stopped the run."""
    config = parse_with_file(TrainConfig, "train.py")
    strategy = read_strategy(config.run.strategy)
    import torch

    from datasets import loading
    from model import training
    from model.freeze import report_text
    from model.video import VideoPredictor
    from utils.distributed import Ranks
    from utils.engine import OptimizerSettings, build_engine
    from utils.precision import choose_device
    from utils.run_folder import RunFolder, read_state
    from utils.trainer import Hooks, Stopped, Trainer
    from utils.validation import open_validation

    ranks = Ranks.from_environment()
    device = choose_device(config.run.device, ranks.local_rank)
    forwards = accumulation(config.data, config.optim, ranks.world)
    folder = RunFolder(config.run.out)
    checkpoint = folder.find(config.run.resume)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ranks.join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    ranks.agree(checkpoint and checkpoint.name, "checkpoint to go on from. run.out must be a folder that all share")
    torch.manual_seed(config.run.seed)
    clip_frames = config.data.clip_frames
    mixture = loading.open_mixture(config.data, config.run.seed)
    trained = training.prepare_model(config.model, config.loss, clip_frames)
    step = training.build_step(trained.model, config.loss, clip_frames)
    if checkpoint:
        state = read_state(checkpoint)
        training.restore(step, checkpoint, state["extra"])
    cache = training.open_cache(step, config.data.feature_cache, config.optim.precision, strategy)
    collate = loading.open_collate(config.data, step.spec, trained.model.encoder.image_spec, trained.tokenizer, cache)
    sets = loading.open_validation(config.val, config.data, collate, ranks)
    inputs = training.open_inputs(step, cache)
    follow = partial(VideoPredictor, tokenizer=trained.tokenizer)
    validation = open_validation(sets, cache and inputs.features, follow, config.val.max_images, folder.path, ranks)
    if ranks.is_first:
        if not config.dry_run:
            folder.write_config(to_yaml(config))
        sys.stderr.write(f"{trained.model.config.name}\n{report_text(trained.parts)}\n\n{mixture.describe()}\n\n")
    if config.dry_run:
        return 0

    optim, data = config.optim, config.data
    groups = training.optimizer_groups(step, optim)
    settings = OptimizerSettings(groups, optim.betas, optim.clip, optim.precision, forwards, data.batch_size)
    engine = build_engine(step, settings, device, strategy, trained.outside)
    hooks = Hooks(inputs, trained.save, validation, training.lora_tensors, validation.best_by)
    trainer = Trainer(engine, config, hooks, folder, ranks)
    if checkpoint:
        trainer.resume(checkpoint, state)
    batches = loading.training_batches(mixture, collate, data, ranks, forwards, pin_memory=device.type == "cuda")
    try:
        trainer.run(batches)
    except Stopped as stop:
        sys.stderr.write(f"{stop}\n")
    ranks.leave()  # not after an error: the others may wait in a collective, until torchrun ends them
    return SIGTERM_STATUS if trainer.step < optim.steps else 0


if __name__ == "__main__":
    run_main(main)
