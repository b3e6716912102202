"""Lightning with manual optimisation; the balancer's state lies in Lightning's checkpoints.

python lightning_manual.py   and torchrun --nproc-per-node 2 lightning_manual.py FOLDER"""

import logging
import warnings

import lightning
import torch
from torch.utils.data import DataLoader
from toy import BATCH, RANK, RANKS, Model, dataset, folder, prove

import gradnorm_func as gn

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")  # between Lightning and torch


class Balanced(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False  # so that a step that is not finite can be left out
        self.model, self.balancer = Model(), gn.gradnorm(form="log")  # "invariant" would need the first step's losses
        self.balance_state = self.balancer.init(3, dtype=torch.float64)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)

    def training_step(self, batch, index):
        optimizer, weights = self.optimizers(), self.balance_state.weights
        losses, copies = self.model(**batch)
        stats = gn.measure_losses(losses, copies, num_examples=len(batch["x"]))  # before Lightning scales any loss
        optimizer.zero_grad()
        self.manual_backward(gn.weighted_sum(losses, weights))
        stats = gn.all_reduce(stats) if self.trainer.world_size > 1 else stats
        self.balance_state, info = self.balancer.balance(self.balance_state, stats)
        if info.finite:
            optimizer.step()
        self.log_dict({name: value.double() for name, value in gn.log_dict(info, losses).items()})

    def on_save_checkpoint(self, checkpoint):
        checkpoint["balancer"] = gn.state_dict(self.balance_state)

    def on_load_checkpoint(self, checkpoint):
        self.balance_state = gn.load_state(self.balance_state, checkpoint["balancer"])


def fit(epochs, checkpoint=None):
    half = len(dataset()) // 2
    loader = DataLoader(dataset()[half * (epochs - 1) + RANK : half * epochs : RANKS], batch_size=BATCH // RANKS)
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    trainer = lightning.Trainer(accelerator="cpu", devices=RANKS, max_epochs=epochs, **dict.fromkeys(off, False))
    trainer.fit(Balanced(), loader, ckpt_path=checkpoint, weights_only=True)
    return trainer


fit(1).save_checkpoint(file := f"{folder()}/1.ckpt")  # after an epoch: within one, a DataLoader would begin anew
module = fit(2, file).lightning_module
prove(module.balance_state.weights, module.parameters(), "log")
