"""Train: `torchrun --nproc_per_node 2 train.py configs/experiment/NAME.yaml --data.root DIR`."""

import sys

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
    from model.freeze import report_text
    from model.tasks import open_task
    from utils.distributed import Ranks
    from utils.engine import OptimizerSettings, build_engine
    from utils.precision import choose_device
    from utils.run_folder import RunFolder, read_state
    from utils.trainer import Hooks, Stopped, Trainer

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
    mixture = loading.open_mixture(config)
    state = read_state(checkpoint) if checkpoint else {}
    task = open_task(config, strategy, checkpoint, state)
    collate = loading.open_collate(config, task)
    sets = loading.open_validation(config, mixture, collate, ranks)
    validation = task.open_validation(sets, folder.path, ranks)
    if ranks.is_first:
        if not config.dry_run:
            folder.write_config(to_yaml(config))
        sys.stderr.write(f"{task.model.config.name}\n{report_text(task.parts)}\n\n{mixture.describe()}\n\n")
    if config.dry_run:
        return 0

    optim, data = config.optim, config.data
    settings = OptimizerSettings(
        task.optimizer_groups(config), optim.betas, optim.clip, optim.precision, forwards, data.batch_size,
        optim.clip_value,
    )  # fmt: skip
    engine = build_engine(task.step, settings, device, strategy, task.outside)
    hooks = Hooks(task.inputs, task.save, validation, task.extra_state, validation.best_by)
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
