"""Images that learners keep: which ones herding takes, the budget of each class, and that they are read again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cil.learner import LearnerConfig
from cil.learners.bases.exemplars import KeepsExemplars, herding
from cil.runner import run_stages
from cil.runner.checkpoint import RunFolder
from cil.testing.setting import accelerator, backbone, draw_images, stream


class Keeps(KeepsExemplars):
    """A learner that keeps exemplars, and notes what it would train on."""

    class Config(LearnerConfig):
        memory: int = 16

    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.trained = []

    def learn(self, task, ctx):
        self.trained.append(self.with_exemplars(task).labels)
        self.keep(*ctx.features(self, task.train), task)

    def logits(self, features):
        return features[:, : self.seen]


def learned(memory=16, **arguments):
    learner = Keeps(Keeps.Config(memory=memory), backbone())
    run_stages(learner, stream(learner.backbone), accelerator=accelerator(), batch_size=16, **arguments)
    return learner


def test_herding_takes_what_keeps_the_mean():
    x = torch.from_numpy(np.random.RandomState(0).normal(size=(9, 4)))
    chosen = []
    for k in range(1, 6):
        rest = [i for i in range(9) if i not in chosen]
        distances = [np.linalg.norm(x[[*chosen, i]].numpy().sum(0) / k - x.numpy().mean(0)) for i in rest]
        chosen.append(rest[int(np.argmin(distances))])
    assert herding(x, 5).tolist() == chosen
    for count in range(9):
        assert herding(x, count).tolist() == herding(x, count + 1).tolist()[:count]
    assert sorted(herding(x, 99).tolist()) == list(range(9))
    assert herding(torch.ones(4, 2), 3).tolist() == [0, 1, 2]  # of equals the first
    assert herding(torch.zeros(0, 2), 3).tolist() == []


def test_the_budget_is_shared_by_the_classes_seen():
    one, done = learned(stop_after=1), learned()
    assert one.exemplars[:, 0].bincount().tolist() == [4, 4, 4, 4]  # 16 ÷ 4
    counts = done.exemplars[:, 0].bincount().tolist()
    assert counts == [2, 2, 2, 2, 2, 1, 2, 2]  # 16 ÷ 8; one class has a single image
    assert done.exemplar_bytes == sum(counts) * 3 * 32 * 32
    first = one.exemplars[one.exemplars[:, 0] == 1][:2]
    assert torch.equal(done.exemplars[done.exemplars[:, 0] == 1], first)  # the first ones by herding stay
    counted = [np.bincount(labels, minlength=8).tolist() for labels in done.trained]
    assert counted == [[12, 12, 12, 12, 0, 0, 0, 0], [4, 4, 4, 4, 12, 0, 0, 0], [3, 3, 3, 3, 3, 1, 12, 12]]
    assert learned(memory=7).exemplars[:, 0].tolist() == []  # less than one image per class


def test_kept_images_are_those_that_were_chosen():
    done = learned()
    kept = done.kept()
    for data, index in zip(kept, range(3), strict=True):
        rows = done.exemplars[done.exemplars[:, 1] == index]
        images, positions = data.source
        assert data.labels.tolist() == rows[:, 0].tolist()
        assert draw_images("train")[1][positions].tolist() == rows[:, 0].tolist()
        pixels = torch.cat([batch for batch, _ in data.batches(16)])
        theirs = torch.cat([batch for batch, _ in done.tasks[index].batches(64)])
        assert images is done.tasks[index].source[0] and torch.equal(pixels, theirs[rows[:, 2]])


@pytest.mark.slow
def test_a_resumed_learner_reads_the_same_images(tmp_path):
    learned(folder=RunFolder(tmp_path), stop_after=2)
    resumed, whole = learned(folder=RunFolder(tmp_path)), learned()
    assert torch.equal(resumed.exemplars, whole.exemplars)
    assert [labels.tolist() for labels in resumed.trained] == [whole.trained[-1].tolist()]
