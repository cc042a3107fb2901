"""How long a run takes: at speeds that its settings state, or at the speed that a trial finds here."""

from __future__ import annotations

import time

import torch

from qtrain.config import Config
from qtrain.plan import RunPlan
from qtrain.quant import set_step
from qtrain.quant.adapter import set_adapter_step
from qtrain.training.build import build_model
from qtrain.training.communication import Communication
from qtrain.training.losses import next_token_loss
from qtrain.units import describe_bytes, describe_time

TRIAL_FLOPS = 2e11  # of one micro-batch: what a trial may cost, about a second a forward and backward on one core


def trial(config: Config, plan: RunPlan) -> float | None:
    """FLOP per second of forward and backward on this process's CPU threads, the best of three micro-batches of zeros;
    None where one costs more than TRIAL_FLOPS, or where training would be on another device."""
    tokens = config.trainer.micro_batch_size * config.model.seq_len
    flops = tokens * plan.flops_per_token
    device = config.trainer.device
    if flops > TRIAL_FLOPS or device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return None
    model = build_model(config, plan.vocab_size)
    batch = torch.zeros(config.trainer.micro_batch_size, config.model.seq_len + 1, dtype=torch.long)
    times = []
    for step in range(3):
        start = time.perf_counter()
        set_step(model, step)
        set_adapter_step(model, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.trainer.precision == "bf16-mixed"):
            loss = next_token_loss(model, batch)
        loss.backward()
        times.append(time.perf_counter() - start)
    return flops / min(times)


def planned_time(config: Config, plan: RunPlan, communication: Communication) -> str:
    """The time of the whole run, with its arithmetic. Traffic may hide behind computing wholly or not at all: both ends
    are told. A run on one CPU that states no speed is tried out."""
    trainer, steps = config.trainer, f"{plan.steps:,} steps"
    ranks, sent = trainer.world_size, communication.sent
    stated = trainer.device_tflops and trainer.device_tflops * 1e12
    speed = stated or (trial(config, plan) if ranks == 1 else None)
    if speed is None:
        return "unknown: state trainer.device_tflops" + (
            ", and trainer.device_gigabytes_per_second for the traffic" if sent else ""
        )
    computing = plan.flops / ranks / speed
    devices = f" / {ranks} devices" if ranks > 1 else ""
    how = "as stated" if stated else "as three micro-batches here reached"
    lines = [f"{describe_time(computing)} of computing: {plan.flops:.3g} FLOP{devices} / {speed:.3g} FLOP/s {how}"]
    rate = trainer.device_gigabytes_per_second
    if sent and rate is None:
        lines.append("traffic unknown: state trainer.device_gigabytes_per_second")
    elif sent and rate is not None:
        traffic = plan.steps * sent / (rate * 1e9)
        lines.append(f"{describe_time(traffic)} of traffic: {steps} x {describe_bytes(sent)} / {rate:g} GB/s as stated")
        together = f"{describe_time(max(computing, traffic))} if one hides behind the other"
        lines.insert(0, f"{together}, {describe_time(computing + traffic)} if not")
    return "\n".join(lines)
