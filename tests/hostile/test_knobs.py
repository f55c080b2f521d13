"""Command lines with wrong knobs: one sentence that names the knob, exit code 2, nothing written."""

import pytest
from hostile_runs import SHORT, run

VIT = ("backbone.name=vit_tiny_patch16_224", "backbone.stem=auto", "backbone.options.depth=1")

# Command line, and part of the message.
REFUSED = {
    # Keys that are added or removed.
    "+data.foo=1": "data.foo=1: this task has no knob 'data.foo'",
    "++data.foo=1": "data.foo=1: this task has no knob 'data.foo'",
    "+foo=1": "foo=1: this task has no knob 'foo'",
    "~optimizer": "~optimizer: only a logger can be removed",
    "~method.sigma": "~method.sigma: only a logger can be removed",
    "~logger": "~logger: only a logger can be removed",
    "method=null": "method=null: there is no method 'null'; choose one of moco",
    "data=null": "data=null: there is no data 'null'",
    "experiment=null": "experiment=null: there is no experiment 'null'",
    "task=null": "task=null: there is no task 'null'",
    "--method=moco": "--method=moco: there is no such option; write method=moco",
    "--seed 3": "--seed: there is no such option; write seed=VALUE",
    "-seed=3": "-seed=3: there is no such option; write seed=3",
    "seed=1 seed=2": "seed=1 seed=2: seed is given twice; leave one of them out",
    "method=moco method=simclr": "method is given twice",
    "-m seed=1,2 seed=3": "seed is given twice",
    # Values.
    "augment.crop_scale=[0.5]": "augment.crop_scale=[0.5]: give [smallest, largest]",
    "augment.crop_scale=[]": "augment.crop_scale=[]: give [smallest, largest]",
    "augment.blur_sigma=[2,1]": "augment.blur_sigma=[2, 1]: give [smallest, largest]",
    "augment.jitter=[0.1]": "augment.jitter=[0.1]: give brightness",
    "augment.view_b={crop_scale:3}": "augment.crop_scale=3: give [smallest, largest]",
    "augment.view_b={blur_p:often}": "augment.blur_p=often: a probability",
    "scheduler.warmup_epochs=-3": "scheduler.warmup_epochs=-3: must be at least 0",
    "scheduler.end=2": "scheduler.end=2: must lie between 0 and 1",
    "scheduler.warmup_epochs=often": "scheduler.warmup_epochs=often: must be at least 0",
    "trainer.max_steps=null scheduler.warmup_epochs=61": "=61: longer than the run of trainer.max_epochs=60; choose",
    "trainer.max_epochs=5 scheduler.warmup_epochs=6": "longer than the run of trainer.max_epochs=5; choose fewer",
    "trainer.max_steps=25 scheduler.warmup_epochs=3": "longer than the run of trainer.max_steps=25 (2.5 epochs)",
    "trainer.max_steps=5 trainer.accumulate=4 scheduler.warmup_epochs=2": "trainer.max_steps=5 (1.67 epochs)",
    "trainer.accumulate=11": "trainer.accumulate=11: an epoch has 10 batches",
    "method=moco method.queue_size=1e13": "method.queue_size=10000000000000.0: give a whole number",
    "method=moco method.queue_size=10000000000000": "method.queue_size=10000000000000: needs 5,280",
    "method=moco method.momentum=1": "method.momentum=1: the key encoder would never change",
    "method=moco_v3 method.momentum=1.0": "method.momentum=1.0: the key encoder would never change",
    f"{VIT[0]} {VIT[1]} data.image_size=100": "data.image_size=100: cannot be divided into patches of 16 pixels",
    f"{VIT[0]} {VIT[1]} data.image_size=32 backbone.options.patch_size=5": "cannot be divided into patches of 5 pixels",
    # Knobs without an effect.
    "method.sigma=0.1": "method.sigma=0.1: has no effect with variant=infonce, only with dclw",
    "method.variant=debiased method.beta=1": "method.beta=1: has no effect with variant=debiased, only with hard",
    "method=moco method.tau_plus=0.2": "method.tau_plus=0.2: has no effect",
    "task=finetune checkpoint=x optimizer.lr=0.1": "task=finetune chooses one of finetune.learning_rates",
    "select_by=val/linear_top1 eval.parts=[knn]": "select_by=val/linear_top1: this is not among eval.parts=['knn']",
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_wrong_knob_is_one_sentence(line, tmp_path):
    short = () if "task=" in line else (*SHORT[:2], "trainer.max_steps=1")
    given = {word.split("=")[0] for word in line.split()}
    found = run(tmp_path / "work", *line.split(), *(word for word in short if word.split("=")[0] not in given))
    assert found.refused(REFUSED[line]), found


ACCEPTED = {
    "weight_decay_of_0": ("optimizer.weight_decay=0",),
    "weight_decay_of_0_with_sgd": ("optimizer=sgd", "optimizer.weight_decay=0"),
    "warmup_of_the_whole_run": ("scheduler.warmup_epochs=0.2",),
    "no_warmup": ("scheduler.warmup_epochs=0",),
    "momentum_that_ends_at_1": ("method=moco", "method.momentum_end=1"),
    "the_same_twice": ("seed=1", "seed=1"),
    "no_tensorboard": ("~logger.tensorboard",),
    "an_argument_of_the_optimizer": ("optimizer=sgd", "+optimizer.factory.nesterov=true"),
    "a_parameter_of_the_variant": ("method.variant=hard", "method.tau_plus=0.05"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_right_runs(name, tmp_path):
    found = run(tmp_path / "work", *ACCEPTED[name], *SHORT, "eval.parts=[knn]")
    assert (found.code, found.outside) == (0, []), found
