"""How a training step runs on one process or many: DDP through accelerate, FSDP through torch, ZeRO through DeepSpeed.

An engine wraps a module that returns losses, and its optimizer. The trainer sees only `accumulate`, `update` and the
states. All engines average gradients over processes, and step alike.
"""

import contextlib
import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from .errors import MissingPackageError, TrainingError
from .precision import DTYPES

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
WHOLE_TO_ALL = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)

ToLoss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW of some groups of parameters.

    * `groups`: of `torch.optim.AdamW`, each with `params`, `lr` and `weight_decay`.
    * `clip`: largest norm of all gradients; `clip_value`: largest value of any; 0 leaves them.
    * `forwards`: how many forwards one update adds up; `images`: of one forward of one process.
    """

    groups: Sequence[Mapping[str, Any]]
    betas: tuple[float, float]
    clip: float
    precision: str
    forwards: int = 1
    images: int = 1
    clip_value: float = 0.0

    def adamw(self, fused: bool) -> torch.optim.AdamW:
        """Return the optimizer; each group remembers its own learning rate as `base_lr`."""
        groups = [{**group, "base_lr": group["lr"]} for group in self.groups]
        return torch.optim.AdamW(groups, betas=self.betas, fused=fused)


class Engine(ABC):
    """A wrapped module with its optimizer.

    * `module`: as it was given, with the parameters that are trained; `device`: where it runs.
    """

    module: nn.Module
    device: torch.device
    optimizer: torch.optim.Optimizer
    keeps_optimizer = True
    """Whether `optimizer_state` holds the optimizer; else every rank writes its own share with `save_shards`."""
    uses_scaler = False
    """Whether losses are scaled, so that some steps are left out while the scale comes down."""

    @abstractmethod
    def accumulate(self, inputs: Sequence[Any], to_loss: ToLoss, is_last: bool) -> Tensor:
        """Run the module and add the gradients of `to_loss` of what it returns; return that, without a graph.

        Args:
            is_last: whether `update` follows.
        """

    @abstractmethod
    def update(self, factor: float) -> float:
        """Clip, step with the learning rates times `factor`, clear the gradients, return their norm before clipping.

        Where the norm is not finite, the weights stay as they are.
        """

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return what an evaluation runs in, to compute in the precision of the training."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def whole_module(self) -> Iterator[nn.Module]:
        """Give every rank a module with the whole weights, to evaluate. All ranks call it."""
        _share_statistics(self.module)
        yield self.module

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole weights by name, on the CPU; on ranks other than 0 maybe nothing. All ranks call it."""
        return get_model_state_dict(self.module, options=FULL)

    def optimizer_state(self) -> dict[str, Any]:
        """Return what `update` keeps, by parameter names; on ranks other than 0 maybe nothing. All ranks call it."""
        return {"optimizer": get_optimizer_state_dict(self.module, self.optimizer, options=FULL)}

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Load what `optimizer_state` returned, on any number of ranks; only rank 0 needs to have it. All call it."""
        options = WHOLE_TO_ALL if dist.is_initialized() else FULL
        with self._own_rates():
            set_optimizer_state_dict(self.module, self.optimizer, state.get("optimizer", {}), options=options)

    def save_shards(self, folder: Path) -> None:  # noqa: B027
        """Write what every rank must write by itself; for most engines nothing."""

    def load_shards(self, folder: Path) -> None:  # noqa: B027
        """Read what `save_shards` wrote."""

    @contextlib.contextmanager
    def _own_rates(self) -> Iterator[None]:
        """Keep the rates and the decay of this start, whatever a checkpoint says that is loaded meanwhile."""
        own = [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]
        yield
        for group, values in zip(self.optimizer.param_groups, own, strict=True):
            group.update(values)

    def _set_rates(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


class AccelerateEngine(Engine):
    """One process, or DistributedDataParallel, through accelerate: autocast, gradient scaling, accumulation."""

    def __init__(self, module: nn.Module, settings: OptimizerSettings, device: torch.device) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        if settings.precision == "fp16" and device.type == "cpu":
            raise TrainingError("optim.precision fp16 needs a GPU. Set bf16 or fp32")
        if settings.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise TrainingError("this GPU has no bf16. Set optim.precision fp16 or fp32")
        self.module, self.settings = module, settings
        self.accelerator = Accelerator(
            mixed_precision="no" if settings.precision == "fp32" else settings.precision,
            cpu=device.type == "cpu",
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
        )
        self.device, self.uses_scaler = self.accelerator.device, self.accelerator.scaler is not None
        module.to(self.device)
        optimizer = settings.adamw(fused=self.device.type in ("cpu", "cuda"))
        self._wrapped, self._optimizer = self.accelerator.prepare(module, optimizer)
        self.optimizer = self._optimizer.optimizer

    def accumulate(self, inputs: Sequence[Any], to_loss: ToLoss, is_last: bool) -> Tensor:
        """Add gradients; see `Engine.accumulate`. Ranks meet in the last backward of a step."""
        with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self._wrapped):
            losses = self._wrapped(*inputs)
            self.accelerator.backward(to_loss(losses))
        return losses.detach()

    def update(self, factor: float) -> float:
        """Step; see `Engine.update`."""
        self._set_rates(factor)
        self.accelerator.unscale_gradients(self._optimizer)
        norm = _clip(self.optimizer, self.settings)
        if math.isfinite(norm) or self.accelerator.scaler is not None:
            self._optimizer.step()  # a gradient scaler leaves the step out by itself, and then lowers its scale
        self._optimizer.zero_grad()
        return norm

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return what an evaluation runs in."""
        return self.accelerator.autocast()

    def optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's and the gradient scaler's state."""
        scaler = self.accelerator.scaler
        return super().optimizer_state() | ({"scaler": scaler.state_dict()} if scaler else {})

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Load both."""
        super().load_optimizer_state(state)
        if self.accelerator.scaler and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])


class ShardedEngine(Engine):
    """Fully sharded data parallel (torch `fully_shard`): each rank keeps its share of weights, gradients and moments.

    Args:
        unit: name of the class whose modules are gathered one at a time.
    """

    def __init__(self, module: nn.Module, settings: OptimizerSettings, device: torch.device, unit: str) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        if settings.precision == "fp16":
            raise TrainingError("strategy fsdp takes fp32 or bf16: fp16 needs ddp. Set optim.precision bf16")
        self.module, self.device, self.settings = module, device, settings
        self._twin = _Twin(module)
        module.to(device)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        units = [part for part in module.modules() if type(part).__name__ == unit]
        if not units:
            raise TrainingError(f"strategy fsdp: the model has no part {unit!r}. Look at `unit` of the strategy's file")
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        groups = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in settings.groups]
        for part in units:
            fully_shard(part, mesh=mesh)
        fully_shard(module, mesh=mesh)
        sharded = dict(module.named_parameters())  # sharding puts new parameters in place
        groups = [{**group, "params": [sharded[name] for name in group["params"]]} for group in groups]
        self.optimizer = OptimizerSettings(groups, settings.betas, settings.clip, settings.precision).adamw(fused=False)

    def accumulate(self, inputs: Sequence[Any], to_loss: ToLoss, is_last: bool) -> Tensor:
        """Add gradients; see `Engine.accumulate`."""
        self.module.set_requires_gradient_sync(is_last)
        with self.autocast():
            losses = self.module(*inputs)
        to_loss(losses).backward()
        return losses.detach()

    def update(self, factor: float) -> float:
        """Step; see `Engine.update`."""
        self._set_rates(factor)
        norm = _clip(self.optimizer, self.settings)
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return what forwards run in."""
        return _autocast(self.device, self.settings.precision)

    @contextlib.contextmanager
    def whole_module(self) -> Iterator[nn.Module]:
        """Yield a second module with the gathered weights; they are let go afterwards."""
        _share_statistics(self.module)
        state = get_model_state_dict(self.module, options=StateDictOptions(full_state_dict=True))
        with self._twin.holding(state) as module:
            yield module


class DeepSpeedEngine(Engine):
    """DeepSpeed's own engine: ZeRO stage 1 to 3.

    Its optimizer state is cut by ranks, so it goes on with the same number of ranks only.

    Args:
        config: DeepSpeed's settings, as in its JSON files; batch sizes, clipping and precision are filled in.
        outside: names of parameters that are read without a call of the module that owns them: stage 3 gathers weights
            when their module is called, so these are gathered for the whole forward.

    Raises:
        MissingPackageError: deepspeed is not installed. TrainingError: fp16, or settings that disagree.
    """

    keeps_optimizer = False

    def __init__(
        self,
        module: nn.Module,
        settings: OptimizerSettings,
        device: torch.device,
        config: Mapping[str, Any],
        outside: Sequence[str] = (),
    ) -> None:
        try:
            import deepspeed
        except ImportError:
            raise MissingPackageError(
                "strategy zero needs deepspeed. Run: pip install -r requirements-gpu.txt"
            ) from None

        if settings.precision == "fp16":
            raise TrainingError("strategy zero takes fp32 or bf16: fp16 needs ddp. Set optim.precision bf16")
        if settings.clip_value:
            raise TrainingError("strategy zero clips by norm alone: optim.clip_value needs ddp or fsdp")
        filled = {
            "train_micro_batch_size_per_gpu": settings.images,
            "gradient_accumulation_steps": settings.forwards,
            "gradient_clipping": settings.clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        if settings.precision == "bf16":
            filled["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        for key in filled.keys() & config.keys():
            raise TrainingError(f"strategy: {key} is set by optim and data. Leave it out of the strategy's file")
        self.module, self.settings, self._deepspeed = module, settings, deepspeed
        self._twin = _Twin(module)
        module.to(device)
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=settings.adamw(fused=False), config={**config, **filled}
        )
        self.device = torch.device(self._engine.device)
        if self._engine.zero_optimization_stage() == 3:
            for name in outside:
                deepspeed.zero.register_external_parameter(module, module.get_parameter(name))

    def accumulate(self, inputs: Sequence[Any], to_loss: ToLoss, is_last: bool) -> Tensor:
        """Add gradients; see `Engine.accumulate`. DeepSpeed divides a loss by the number of forwards: undone here."""
        losses = self._engine(*inputs)
        self._engine.backward(to_loss(losses) * self.settings.forwards)
        if not is_last:
            self._engine.step()  # counts the forward; the weights stay
        return losses.detach()

    def update(self, factor: float) -> float:
        """Step; see `Engine.update`."""
        self._set_rates(factor)
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return what an evaluation runs in."""
        return _autocast(self.device, self.settings.precision)

    @contextlib.contextmanager
    def whole_module(self) -> Iterator[nn.Module]:
        """Yield the module, or with stage 3 a second one that holds the gathered weights.

        Stage 3 gathers again in every forward, all ranks together: ranks with fewer batches would keep others waiting.
        """
        _share_statistics(self.module)
        if self._engine.zero_optimization_stage() < 3:
            yield self.module
            return
        with self._gathered():
            state = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}
        with self._twin.holding(state) as module:
            yield module

    def _gathered(self) -> contextlib.AbstractContextManager:
        return self._deepspeed.zero.GatheredParameters(list(self.module.parameters()))

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole weights by name, copied to the CPU on rank 0."""
        with self._gathered():
            state = self.module.state_dict() if dist.get_rank() == 0 else {}
            return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def optimizer_state(self) -> dict[str, Any]:
        """Return nothing: `save_shards` writes it."""
        return {}

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Do nothing: `load_shards` reads it."""

    def save_shards(self, folder: Path) -> None:
        """Write DeepSpeed's checkpoint."""
        self._engine.save_checkpoint(str(folder), tag="zero", save_latest=False)

    def load_shards(self, folder: Path) -> None:
        """Read DeepSpeed's checkpoint.

        Raises:
            TrainingError: it was written by another number of ranks.
        """
        shards = len(list((folder / "zero").glob("*zero_pp_rank_*optim_states.pt")))
        if not shards:
            raise TrainingError(
                f"{folder} was not written by DeepSpeed. Go on with the same run.strategy as before, or start anew "
                "from its weights with model.checkpoint"
            )
        if shards != dist.get_world_size():
            raise TrainingError(
                f"{folder} was written by {shards} ranks, here are {dist.get_world_size()}. DeepSpeed goes on with the "
                "same number only: use it, or start anew from these weights with model.checkpoint"
            )
        with self._own_rates():
            self._engine.load_checkpoint(str(folder), tag="zero")


def _clip(optimizer: torch.optim.Optimizer, settings: OptimizerSettings) -> float:
    """Return the norm of all gradients; scale them down where it is above `clip`, cut off what is over `clip_value`."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, settings.clip or math.inf)
    if settings.clip_value:
        nn.utils.clip_grad_value_(trained, settings.clip_value)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return float(norm)


def _share_statistics(module: nn.Module) -> None:
    """Give every rank the statistics of rank 0's batch norms: those are saved, so those are to be measured."""
    if dist.is_initialized():
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                for buffer in part.buffers(recurse=False):
                    dist.broadcast(buffer, 0)


def _autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


class _Twin:
    """A second module for evaluations: shapes alone, but for while it holds weights that were gathered."""

    def __init__(self, module: nn.Module) -> None:
        self._module = _without_weights(module)

    @contextlib.contextmanager
    def holding(self, state: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """Yield the module with the tensors of a state in place, without copies; they are let go afterwards."""
        self._module.load_state_dict(state, assign=True)
        try:
            yield self._module
        finally:
            self._module = _without_weights(self._module)


def _without_weights(module: nn.Module) -> nn.Module:
    """Return a copy of a module whose parameters are shapes alone; its buffers are the same tensors."""
    memo = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in module.parameters()}
    memo |= {id(buffer): buffer for buffer in module.buffers()}
    return copy.deepcopy(module, memo)


def build_engine(
    module: nn.Module,
    settings: OptimizerSettings,
    device: torch.device,
    strategy: Mapping[str, Any],
    outside: Sequence[str] = (),
) -> Engine:
    """Return the engine of a strategy: the content of a file of `configs/strategy/`.

    Args:
        strategy: `kind` is ddp, fsdp or deepspeed; fsdp has `unit`, deepspeed has `config`.
        outside: names of parameters that are read without a call of the module that owns them.

    Raises:
        TrainingError: an unknown kind or key, or fsdp and deepspeed on a single process without torchrun.
    """
    known = {"ddp": set(), "fsdp": {"unit"}, "deepspeed": {"config"}}
    kind, options = strategy.get("kind"), {key: value for key, value in strategy.items() if key != "kind"}
    if kind not in known or set(options) != known[kind]:
        needed = {name: sorted(keys) for name, keys in known.items()}
        raise TrainingError(f"strategy {dict(strategy)}: needed are a kind with its keys, one of {needed}")
    if kind == "ddp":
        return AccelerateEngine(module, settings, device)
    if not dist.is_initialized():
        raise TrainingError(f"strategy {kind} needs 2 or more processes of torchrun. Use --run.strategy ddp for one")
    if kind == "fsdp":
        return ShardedEngine(module, settings, device, options["unit"])
    return DeepSpeedEngine(module, settings, device, options["config"], outside)
