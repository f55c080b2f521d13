"""Functions that build and run the Lightning Trainer."""

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed as dist, nn

from twoview.backbones import is_depthwise
from twoview.devices import explained_memory, pick_device, require_memory
from twoview.errors import UserError, require
from twoview.training.checkpoints import AtomicCheckpointIO
from twoview.training.lightning_internals import process_observer, skip_sigterm_broadcast
from twoview.training.loader import PretrainingData
from twoview.training.ranks import Ranks
from twoview.training.settings import Loggers, TrainerSettings


def build_trainer(
    settings: TrainerSettings, network: nn.Module, callbacks: Sequence[L.Callback], loggers: Loggers, run_dir: Path
) -> L.Trainer:
    """Build the Trainer.

    Args:
        settings: length, devices and precision.
        network: backbone, which determines the precision "auto".
        callbacks: Lightning callbacks.
        loggers: Lightning loggers.
        run_dir: folder for the files of the run.

    Raises:
        UserError: if devices or precision are not available.
    """
    nodes, device = _nodes(settings.devices), pick_device(settings.accelerator)
    _check_memory(network, device)
    # Hide start-up messages of Lightning and warnings about settings that are chosen on purpose.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    expected = (
        "many workers|before the epoch ended|Experiment logs|LeafSpec|logging interval|broadcast_buffers|sync_dist"
    )
    warnings.filterwarnings("ignore", f".*({expected}).*")
    precision = choose_precision(settings.precision, network, device)
    try:
        trainer = L.Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            num_nodes=nodes,
            # No broadcast of buffers: queues are already equal on all ranks, BatchNorm statistics may differ.
            strategy=DDPStrategy(broadcast_buffers=False, timeout=timedelta(minutes=settings.timeout))
            if nodes * settings.devices > 1
            else "auto",
            precision=precision,  # type: ignore[arg-type]
            max_epochs=settings.max_epochs or -1,
            max_steps=settings.max_steps or -1,
            accumulate_grad_batches=settings.accumulate,
            gradient_clip_val=settings.clip,
            log_every_n_steps=settings.log_every,
            callbacks=list(callbacks),
            logger=list(loggers.values() if isinstance(loggers, Mapping) else loggers),
            plugins=[AtomicCheckpointIO(), *_environment()],
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=run_dir,
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        knobs = " ".join(f"trainer.{k}={getattr(settings, k)}" for k in ("accelerator", "devices", "precision"))
        raise UserError(f"{knobs}: {str(error).splitlines()[0]}") from error
    skip_sigterm_broadcast(trainer)
    return trainer


def _check_memory(network: nn.Module, device: torch.device) -> None:
    """Refuse a network whose weights and gradients alone do not fit; the system would kill the process."""
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    # In the memory of the CPU, the weights are already there, and only the gradients are still needed.
    needed = weights if device.type == "cpu" else 2 * weights
    require_memory("backbone.name", needed, "choose a smaller network", device)


def _nodes(devices: int) -> int:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 1
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    advice = f"torchrun has started {here} processes here; give trainer=ddp trainer.devices={here}"
    require(here == devices, f"trainer.devices={devices}: {advice}")
    return int(os.environ["WORLD_SIZE"]) // here


def _environment() -> list[LightningEnvironment]:
    """Start the processes of a node here, unless torchrun has; a job of SLURM with one task would train on one."""
    return [] if "TORCHELASTIC_RUN_ID" in os.environ else [LightningEnvironment()]


def fit(trainer: L.Trainer, module: L.LightningModule, data: PretrainingData, checkpoint: str | None) -> None:
    """Train.

    Args:
        trainer: Lightning Trainer.
        module: Lightning module.
        data: batches of images.
        checkpoint: path of a checkpoint whose state is loaded first; None to start from the beginning.

    Raises:
        UserError: if training runs out of memory, or another process of the run is lost.
    """
    environment, threads = dict(os.environ), torch.get_num_threads()
    ranks, batch = Ranks(Path(trainer.default_root_dir)), data.images.batch_size
    smaller = "try a smaller data.batch_size, data.image_size or backbone.name"
    advice = f"{smaller}, or trainer.micro_batch=N, backbone.checkpointing=true or trainer.precision=bf16-mixed"
    try:
        with process_observer(ranks.watch), explained_memory(f"data.batch_size={batch}: out of memory; {advice}"):
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # after which Lightning exits with 1
            raise stop.__context__ from None
        raise
    except RuntimeError as error:
        lost = ranks.error(error) if trainer.world_size > 1 else None
        ranks.end()
        if lost is not None:
            raise lost from error
        raise
    finally:
        ranks.done.set()
        if trainer.world_size > 1 and dist.is_initialized():
            # Restore single-process state.
            dist.destroy_process_group()
            os.environ.clear()
            os.environ.update(environment)
            torch.set_num_threads(threads)


def choose_precision(precision: str, network: nn.Module, device: torch.device) -> str:
    """Return the precision of training as a name of Lightning.

    Args:
        precision: "auto", "32-true", "bf16-mixed" or "16-mixed". "auto" is "bf16-mixed" if the device supports bf16
            natively, and "32-true" otherwise. On a CPU, "auto" is "32-true" for networks with mostly depthwise
            convolutions, which are slower in bf16.
        network: network to train.
        device: device that the network is trained on.

    Raises:
        UserError: if the precision is unknown, or is fp16 on a CPU, where one batch takes minutes.
    """
    names = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true"}
    precision = names.get(str(precision), str(precision))
    known, possible = precision in ("auto", *names.values()), device.type != "cpu" or not precision.startswith("16")
    require(known, f"trainer.precision={precision}: choose auto, {', '.join(names.values())}")
    require(possible, f"trainer.precision={precision}: a CPU cannot train in fp16; use auto, bf16-mixed or 32-true")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() and not is_depthwise(network)
    return "bf16-mixed" if native else "32-true"
