"""Hugging Face Trainer with gradient accumulation; the balancer's state lies in the Trainer's checkpoints.

python hf_trainer.py         and torchrun --nproc-per-node 2 hf_trainer.py FOLDER"""

import torch
from toy import BATCH, Model, dataset, default_collate, folder, prove
from transformers import Trainer, TrainerCallback, TrainingArguments

import gradnorm_func as gn


class Balance(TrainerCallback):
    def __init__(self, checkpoint=None):
        # Not "invariant": L(0) of a whole step is known after its last micro-batch.
        self.balancer, self.running = gn.gradnorm(form="log"), None
        self.state = self.balancer.init(3, dtype=torch.float64)
        if checkpoint:
            self.state = gn.load_state(self.state, torch.load(f"{checkpoint}/balancer.pt", weights_only=True))

    def on_pre_optimizer_step(self, args, state, control, model, **others):  # once a step, after its micro-batches
        stats = gn.all_reduce(self.running) if args.world_size > 1 else self.running
        self.state, info = self.balancer.balance(self.state, stats)
        self.running = None
        if not info.finite:
            model.zero_grad()  # to None: the optimizer passes over all parameters

    def on_save(self, args, state, control, **others):
        if args.should_save:
            torch.save(gn.state_dict(self.state), f"{args.output_dir}/checkpoint-{state.global_step}/balancer.pt")


class BalancedTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses, copies = model(**inputs)
        if model.training:  # before backward: the Trainer divides the loss, and a scaler may multiply it
            stats = gn.measure_losses(losses, copies, num_examples=len(inputs["x"]))
            self.balance.running = gn.merge(self.balance.running, stats)
        weights = self.balance.state.weights  # of all the step's micro-batches: they change on_pre_optimizer_step
        loss = gn.weighted_sum(losses, weights)
        return (loss, losses) if return_outputs else loss


def train(out, checkpoint=None):
    # The Trainer's own find_unused_parameters=True would make DDP hand out other tensors than the copies.
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "lr_scheduler_type": "constant"}
    options |= {"train_sampling_strategy": "sequential", "remove_unused_columns": False, "max_grad_norm": 0.0}
    options |= {"gradient_accumulation_steps": 2, "num_train_epochs": 1, "save_steps": 10}
    args = TrainingArguments(out, ddp_find_unused_parameters=False, **options)
    args.per_device_train_batch_size = BATCH // (2 * args.world_size)
    optimizers = torch.optim.SGD((model := Model()).parameters(), lr=1e-3, momentum=0.9), None
    trainer = BalancedTrainer(model, args, default_collate, dataset(), optimizers=optimizers)
    trainer.balance = Balance(checkpoint)
    trainer.add_callback(trainer.balance)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer.balance.state.weights, model.parameters()


train(out := folder())
prove(*train(out, checkpoint=f"{out}/checkpoint-10"), "log")
