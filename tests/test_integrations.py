"""Hugging Face's Trainer and Accelerate give a converted model the gradients of a loop that calls set_step itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qtrain
from qtrain.errors import UserError

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
accelerate = pytest.importorskip("accelerate", reason="the extra hf is not installed")

SEED, MICRO_BATCHES, STEPS = 7, 2, 3
Gradients = list[list[Tensor]]  # of all parameters, at each optimiser step


def llama(recipe: str | None = "quartet_v1", seed: int = 0) -> Any:
    """The same weights at every call; the recipe rounds at random in the backward, and redraws its signs."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=32,
        )
    )  # fmt: skip
    if recipe:
        qtrain.convert(model, recipe, seed=seed, backend="reference")
    return model.train()


def documents(number: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 64, (number, 32), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": each, "labels": each} for each in ids]


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def equal(left: Gradients, right: Gradients) -> bool:
    assert len(left) == len(right) > 1 and all(left) and all(right)
    return all(map(torch.equal, (each for step in left for each in step), (each for step in right for each in step)))


class Recorder(transformers.Trainer):
    """Keeps what each micro-batch was made of, and the gradients before each optimiser step."""

    def __init__(self, model: nn.Module, folder: Path, callbacks: list[Any]):
        self.seen: list[tuple[dict[str, Tensor], Any]] = []
        self.gradients: Gradients = []
        arguments = transformers.TrainingArguments(
            str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=MICRO_BATCHES, max_steps=STEPS,
            seed=SEED, use_cpu=True, max_grad_norm=0, report_to=[], save_strategy="no", disable_tqdm=True,
            logging_strategy="no",
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        data = documents(2 * MICRO_BATCHES * STEPS)
        super().__init__(model, arguments, train_dataset=data, optimizers=(optimizer, constant), callbacks=callbacks)  # pyright: ignore

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.seen.append(({name: each.clone() for name, each in inputs.items()}, num_items_in_batch))
        loss = super().training_step(model, inputs, num_items_in_batch)
        if len(self.seen) % MICRO_BATCHES == 0:
            self.gradients.append(gradients_of(model))
        return loss


def plain(seen: list[tuple[dict[str, Tensor], Any]], seed: int, keyed: bool = True) -> Gradients:
    """A loop of one's own over the same micro-batches. keyed: each has a number of its own."""
    model, found = llama(seed=seed), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number, (inputs, items) in enumerate(seen):
        step, micro_batch = divmod(number, MICRO_BATCHES)
        qtrain.set_step(model, step, micro_batch if keyed else 0)
        model(**inputs, num_items_in_batch=items).loss.backward()
        if micro_batch == MICRO_BATCHES - 1:
            found.append(gradients_of(model))
            optimizer.step()
            optimizer.zero_grad()
    return found


def test_the_trainers_callback_keys_each_micro_batch(tmp_path: Path) -> None:
    from qtrain.integrations.transformers import StepCallback

    trainer = Recorder(llama(), tmp_path, [StepCallback()])
    trainer.train()
    assert len(trainer.seen) == MICRO_BATCHES * STEPS
    assert equal(trainer.gradients, plain(trainer.seen, SEED))
    assert not equal(trainer.gradients, plain(trainer.seen, SEED, keyed=False)), "the comparison sees the micro-batch"
    assert not equal(trainer.gradients, plain(trainer.seen, 0)), "and the seed, which is that of the arguments"


def test_without_the_callback_or_a_conversion_the_trainer_is_told(tmp_path: Path) -> None:
    from qtrain.integrations.transformers import StepCallback

    with pytest.raises(UserError, match="no step is set to key them"):
        Recorder(llama(), tmp_path, []).train()
    with pytest.raises(UserError, match=r"no quantised layer in the model; call qtrain.convert before Trainer"):
        Recorder(llama(recipe=None), tmp_path, [StepCallback()]).train()


@pytest.fixture
def accelerator() -> Iterator[Any]:
    yield accelerate.Accelerator(gradient_accumulation_steps=MICRO_BATCHES, cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def test_accelerates_counter_keys_each_micro_batch(accelerator: Any) -> None:
    """Five micro-batches, two a step: the last step has one, since the loader ends."""
    from qtrain.integrations.accelerate import Steps

    model = llama(seed=SEED)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(documents(10), batch_size=2)  # pyright: ignore
    batches = [{name: each.clone() for name, each in batch.items()} for batch in loader]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps, found, counted = Steps(accelerator, model), [], []
    for batch in loader:
        counted.append((steps.step, steps.micro_batch))
        with steps.accumulate():
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                found.append(gradients_of(model))
            optimizer.step()
            optimizer.zero_grad()
    assert counted == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]

    model, expected = llama(seed=SEED), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for (step, micro_batch), batch in zip(counted, batches, strict=True):
        qtrain.set_step(model, step, micro_batch)
        (model(**batch).loss / MICRO_BATCHES).backward()
        if (step, micro_batch) in {(0, 1), (1, 1), (2, 0)}:
            expected.append(gradients_of(model))
            optimizer.step()
            optimizer.zero_grad()
    assert equal(found, expected)

    later = Steps(accelerator, model)
    later.load_state_dict(steps.state_dict())
    assert (later.step, later.micro_batch) == (3, 0)
    with pytest.raises(UserError, match=r"call qtrain.convert before accelerator.prepare"):
        Steps(accelerator, llama(recipe=None))
