"""Avalanche's strategies as learners against plain Avalanche scripts; learners in its scripts against our runner."""

from __future__ import annotations

import copy
import inspect
import io
import random
import runpy
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from avalanche.training import supervised
from marks import slow_beyond
from torch import nn

from cil import metrics, results
from cil.avalanche import as_strategy, benchmark, configs, stage
from cil.avalanche.codec import Codec
from cil.backbone import load_backbone
from cil.classifiers import LinearHead
from cil.config import LearnerEntry, TransformConfig
from cil.data.images import ImageSet, subset
from cil.data.sources import digits, rank_in_class
from cil.data.transforms import Transforms
from cil.errors import BackboneError, ConfigError, StreamError, TrainingError
from cil.learners import registry
from cil.runner import run_stages
from cil.stream import Stream
from cil.stream.protocol import ClassIncremental
from cil.testing import CHECKS, Case, parametrize_learner
from cil.testing.setting import accelerator, backbone, context, stream
from cil.utils.randomness import generator, isolated, seed_everything

SMALL = {"epochs": 3, "train_batch_size": 8, "optimizer": "adamw", "lr": 1e-3}
PLAIN = {"epochs": 2, "train_batch_size": 8, "optimizer": "sgd", "momentum": 0.0, "lr": 0.05}
PLAIN |= {"schedule": "constant", "warmup": 0.0}
STRATEGIES = [
    ("avalanche", {"name": "Naive"}),
    ("avalanche", {"name": "EWC", "ewc_lambda": 20}),
    ("avalanche", {"name": "EWC", "ewc_lambda": 20, "mode": "online", "decay_factor": 0.5}),
    ("avalanche", {"name": "LwF", "alpha": 2, "temperature": 3}),
    ("avalanche", {"name": "MAS", "lambda_reg": 1}),
    ("avalanche_replay", {"name": "Replay", "mem_size": 10}),
    ("avalanche_replay", {"name": "ER_ACE", "mem_size": 10, "batch_size_mem": 4}),
    ("avalanche_replay", {"name": "AGEM", "patterns_per_exp": 5, "sample_size": 9}),
]
OWN = [  # no plain script with a growing head runs these, see the tests further down
    ("avalanche_replay", {"name": "DER", "mem_size": 10, "batch_size_mem": 4}),
    ("avalanche_replay", {"name": "ICaRL", "memory_size": 16}),
]
HERDED = [
    {"name": "Replay", "mem_size": 10, "selection": "herding"},
    {"name": "DER", "mem_size": 10, "batch_size_mem": 4, "selection": "herding"},
    {"name": "ER_ACE", "mem_size": 10, "batch_size_mem": 4, "selection": "herding"},
]


@parametrize_learner(
    [
        ("avalanche", {"strategy": "EWC", **SMALL}),
        ("avalanche_replay", {"strategy": {"name": "Replay", "mem_size": 10}, **SMALL}),
        ("l2_sp", {"epochs": 6, "lr": 1e-3, "train_batch_size": 8, "optimizer": "adamw", "loss": "local"}),
    ]
)
def test_common_checks(case, check):
    check(case)


@pytest.mark.slow
@parametrize_learner(
    [
        ("avalanche", {"strategy": "LwF", **SMALL}),
    ]
)
def test_common_checks_of_variants(case, check):
    check(case)


@pytest.mark.parametrize(
    ("name", "strategy"),
    slow_beyond([STRATEGIES[4], OWN[0]], [STRATEGIES[4], *STRATEGIES[6:], *OWN, ("avalanche_replay", HERDED[0])]),
)
def test_every_strategy_goes_on_after_an_interruption_as_if_there_had_been_none(name, strategy):
    CHECKS["resume"](Case(registry.resolve(name), {"strategy": strategy, **SMALL, "epochs": 1}))


# --- strategies as learners ----------------------------------------------------------------------------------------


class PlainModel(nn.Module):
    """timm's own model with a head that grows at every experience by the rows a learner of ours would draw."""

    def __init__(self, vit, seed):
        from avalanche.models import DynamicModule

        class Grows(DynamicModule):
            def __init__(self):
                super().__init__()
                self.weight, self.bias = nn.Parameter(torch.zeros(0, vit.feature_dim)), nn.Parameter(torch.zeros(0))
                self.generators = {}

            def adaptation(self, experience):
                head = LinearHead(vit.feature_dim)
                head.weight, head.bias = self.weight, self.bias
                index = experience.current_experience
                if index not in self.generators:  # also called by eval
                    self.generators[index] = generator(seed, index)
                    head.grow(max(experience.classes_seen_so_far) + 1, self.generators[index])
                    self.weight, self.bias = head.weight, head.bias

            def forward(self, x):
                return F.linear(x, self.weight, self.bias)

        super().__init__()
        self.vit = copy.deepcopy(vit.model).requires_grad_()
        self.head = Grows()

    def forward(self, images):
        return self.head(self.vit(images))


def plain_script(name, parameters, tasks, vit, seed=0):
    """An ordinary Avalanche script: one strategy that lives through the whole stream."""
    model = PlainModel(vit, seed)
    strategy = getattr(supervised, name)(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=PLAIN["lr"]),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=PLAIN["train_batch_size"],
        train_epochs=PLAIN["epochs"],
        eval_mb_size=16,
        evaluator=None,
        **parameters,
    )
    for experience in benchmark(tasks).train_stream:
        drawn = generator(seed, experience.current_experience)
        LinearHead(vit.feature_dim).grow(len(experience.classes_in_this_experience), drawn)
        with isolated():
            seed_everything(int(torch.randint(2**62, (), generator=drawn)))
            strategy.train(experience, eval_streams=[])
    return model


@pytest.mark.parametrize(
    ("name", "strategy"),
    slow_beyond(STRATEGIES[1::4], STRATEGIES),
    ids=lambda v: v if isinstance(v, str) else v["name"],
)
@pytest.mark.filterwarnings("ignore")  # about Avalanche's own code
def test_a_strategy_built_anew_for_every_task_is_the_one_that_lives_through_the_stream(name, strategy):
    """Same model, order and seeds: the same weights after all tasks, augmentation and memories included."""
    vit = backbone()
    learner = Case(registry.resolve(name), {"strategy": strategy, **PLAIN}).run(vit=vit).learner
    parameters = {key: value for key, value in strategy.items() if key != "name"}
    model = plain_script(strategy["name"], parameters, stream(vit), vit)
    theirs, naive = dict(model.vit.named_parameters()), naively_trained()
    away = 0.0
    for key, ours in learner.tuner.weights().items():
        torch.testing.assert_close(ours, theirs[key], atol=2e-5, rtol=1e-4)
        away = max(away, float((ours - naive[key]).abs().max()))
    torch.testing.assert_close(learner.head.weight, model.head.weight, atol=2e-5, rtol=1e-4)
    assert away > 1e-3 or strategy["name"] == "Naive"  # the strategy did something


@lru_cache(maxsize=1)
def naively_trained():
    return Case(registry.resolve("avalanche"), {"strategy": "Naive", **PLAIN}).run().learner.tuner.weights()


def on_digits(vit, per_class=12, sizes=(4, 3, 3), order=1993):
    """Digits on the checks' small backbone, without augmentation."""
    sets = []
    for split in ("train", "test"):
        source = digits(split)
        few = np.flatnonzero(rank_in_class(source.labels) < per_class)
        transforms = Transforms(vit.data_config, TransformConfig(augment="none"))
        sets.append(ImageSet(subset(source, few, "few"), transforms))
    return Stream(*sets, ClassIncremental(order, sizes=sizes))


def two_tasks(vit, strategy, tasks, between=lambda learner: None, name="avalanche", **parameters):
    """A learner after two tasks, and what it logged on the second."""
    learner = Case(registry.resolve(name), {"strategy": strategy, **PLAIN, **parameters}).learner(vit)
    logged = []
    for task in tasks.tasks[:2]:
        ctx = context(task.index, log=lambda key, value: logged.append((key, value)))
        if task.index:
            between(learner)
            logged.clear()
        learner.begin(task, ctx)
        learner.train()
        learner.learn(task, ctx)
    return learner.eval(), dict(logged)


def test_ewc_adds_its_penalty():
    """One full-batch step on the second task, from weights pushed off by δ: the loss is Naive's and λ Σ F δ²."""
    vit, whole = backbone(), {"train_batch_size": 1000, "epochs": 1}
    delta = {}

    def push(learner):
        for key, p in learner.tuner.named_parameters():
            delta[key] = 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
            with torch.no_grad():
                p += delta[key]

    tasks = on_digits(vit)
    ewc, loss = two_tasks(vit, {"name": "EWC", "ewc_lambda": 3000}, tasks, push, **whole)
    _, naive = two_tasks(vit, "Naive", on_digits(vit), push, **whole)
    fisher = fisher_by_hand(vit, ewc, on_digits(vit), whole)
    penalty = sum(float((fisher[key] * d.square()).sum()) for key, d in delta.items())
    assert loss["loss"] - naive["loss"] == pytest.approx(3000 * penalty, rel=1e-3) and 3000 * penalty > 0.1
    ewc, online = two_tasks(
        vit, {"name": "EWC", "ewc_lambda": 3000, "mode": "online", "decay_factor": 0.5}, on_digits(vit), push, **whole
    )
    assert online["loss"] == pytest.approx(loss["loss"])  # with one old task there is nothing to tell them apart
    # but what is kept: F_0 / 2 + F_1 instead of both, and the new weights instead of both
    kept = [key for key in dict(ewc.memory.named_buffers()) if "norm/bias" in key and "blocks" not in key]
    assert kept == [f"EWCPlugin/{what}/1/features/tuner/copies/norm/bias" for what in ("saved_params", "importances")]


def fisher_by_hand(vit, learner, tasks, parameters):
    """Squared gradient of the first task's mean loss, at the weights after it, and what the learner kept of it."""
    first = Case(type(learner), {"strategy": "Naive", **PLAIN, **parameters}).learner(vit)
    task = tasks.tasks[0]
    first.begin(task, context())
    first.learn(task, context())
    weights = {key: p.detach().requires_grad_() for key, p in first.tuner.named_parameters()}
    images, labels = next(task.train.batches(1000))
    swapped = {key.removeprefix("copies.").replace("/", "."): w for key, w in weights.items()}
    logits = first.head(torch.func.functional_call(vit.model, swapped, images))
    grads = torch.autograd.grad(F.cross_entropy(logits, labels), [*weights.values()])
    fisher = {key: grad.square() for key, grad in zip(weights, grads, strict=True)}
    for key, value in fisher.items():
        name = f"EWCPlugin/importances/0/features/tuner/{key.replace('.', '/')}"
        torch.testing.assert_close(learner.memory[name], value, atol=1e-6, rtol=1e-3)
    return fisher


def test_lwf_without_weight_is_naive():
    states = [
        Case(registry.resolve("avalanche"), {"strategy": strategy, **PLAIN}).run().learner.state_dict()
        for strategy in ("Naive", {"name": "LwF", "alpha": 0})
    ]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0] if not k.startswith("memory"))


def test_a_local_loss_leaves_old_rows_alone():
    before = {}
    vit, tasks = backbone(), on_digits(backbone())
    learner, _ = two_tasks(
        vit, "Naive", tasks, lambda one: before.update(copy.deepcopy(one.state_dict())), loss="local"
    )
    assert torch.equal(learner.head.weight[:4], before["head.weight"])
    assert not torch.equal(learner.tuner.weights()["norm.bias"], before["tuner.copies.norm/bias"])


@pytest.mark.parametrize("mem_size", [10, 2])
def test_replay_keeps_as_many_images_as_it_may_and_no_more(mem_size):
    """In equal parts for the tasks; of a two-image memory, three tasks leave one without."""
    learner = (
        Case(registry.resolve("avalanche_replay"), {"strategy": {"name": "Replay", "mem_size": mem_size}, **PLAIN})
        .run()
        .learner
    )
    kept = [learner.memory[f"ReplayPlugin/storage_policy/buffer_groups/{j}/places"] for j in range(3)]
    assert [len(places) for places in kept] == {10: [4, 3, 3], 2: [1, 1, 0]}[mem_size]
    assert learner.memory.images == mem_size and learner.exemplar_bytes == mem_size * 3 * 32 * 32
    for j, places in enumerate(kept):
        rows = places[:, 1].tolist()
        assert (places[:, 0] == j).all() and len(set(rows)) == len(rows)
        assert all(0 <= row < len(learner.tasks[j]) for row in rows)


@pytest.mark.parametrize("strategy", slow_beyond(HERDED[:1], HERDED), ids=lambda strategy: strategy["name"])
def test_herding_keeps_the_first_images_of_every_class(strategy):
    """Recomputed from the features by a plain loop; a smaller share or a smaller memory drops the last ones."""
    recipe = {**SMALL, "epochs": 1}
    case = Case(registry.resolve("avalanche_replay"), {"strategy": strategy, **recipe})
    learners, tasks = [case.after(stages).learner for stages in (1, 2)], stream(backbone()).tasks
    places = [rows_of(learner, strategy) for learner in learners]
    choosers = [case.learner(), learners[0]] if strategy["name"] == "ER_ACE" else learners  # before the task, or after
    for index, sizes in enumerate([[3, 3, 2, 2], [2]]):
        images, labels = next(tasks[index].train.batches(999))
        with torch.inference_mode():
            x = F.normalize(choosers[index].features(images))
        for c, size in zip(tasks[index].classes, sizes, strict=True):
            own = np.flatnonzero(labels == c)
            assert places[index][c] == [(index, int(own[i])) for i in herded(x[own], size)]
    assert [len(places[1][c]) for c in range(5)] == [2] * 5
    assert all(places[1][c] == places[0][c][:2] for c in range(4))
    fewer = Case(case.cls, {"strategy": {**strategy, "mem_size": 5}, **recipe}).after(1).learner
    assert all(rows == places[0][c][: len(rows)] for c, rows in rows_of(fewer, strategy).items())


def rows_of(learner, strategy):
    """(task, row) of each exemplar by class, in the order of the memory."""
    group = ("ReplayPlugin" if strategy["name"] == "Replay" else "strategy") + "/storage_policy/buffer_groups"
    return {c: [tuple(p) for p in learner.memory[f"{group}/{c}/places"].tolist()] for c in range(learner.seen)}


def test_orders_of_a_class_that_returns_are_merged():
    """Place by place, the image of the newer task first."""
    from cil.avalanche.data import whole_task
    from cil.avalanche.herded import Herded

    x = [torch.tensor([[0.0], [5], [1], [3]]), torch.tensor([[9.5], [7], [8]])]
    herds = None
    for task, rows in enumerate(x):
        images = whole_task(task, (None, np.arange(len(rows))), np.zeros(len(rows), np.int64))
        herds = Herded(9, lambda _, rows=rows: rows, herds)
        herds.update_from_dataset(images)
    first, second = (herded(rows, len(rows)) for rows in x)
    assert (first, second) == ([3, 2, 1, 0], [2, 0, 1])
    both = [(1, 2), (0, 3), (1, 0), (0, 2), (1, 1), (0, 1), (0, 0)]
    assert list(herds.buffer.places) == both
    herds.resize(None, 3)
    assert list(herds.buffer.places) == both[:3]


@pytest.mark.parametrize(
    ("strategy", "kept"),
    [
        ({"name": "DER", "mem_size": 3, "batch_size_mem": 2}, [3] * 8),  # five classes end without an image
        ({"name": "AGEM", "patterns_per_exp": 2, "sample_size": 8}, [2, 4, 6, 8, 10, 11, 13, 15]),  # one class has one
        ({"name": "AGEM", "sample_size": 4}, "stage 4: AGEM's sample_size is 4"),
        ({"name": "ICaRL", "memory_size": 3}, [3, 4, 3, 4, 5, 6, 7, 8]),  # rounded up to whole images a class
    ],
)
def test_memories_that_are_small_for_the_stream(strategy, kept):
    vit = backbone()
    learner = Case(registry.resolve("avalanche_replay"), {"strategy": strategy, **PLAIN, "epochs": 1}).learner(vit)
    if isinstance(kept, str):
        with pytest.raises(TrainingError, match=kept):
            run_stages(learner, stream(vit, sizes=(1,) * 8), accelerator=accelerator())
        return
    rows = run_stages(learner, stream(vit, sizes=(1,) * 8), accelerator=accelerator())
    assert [row["costs"]["exemplar_bytes"] / (3 * 32 * 32) for row in rows] == kept


def test_der_holds_an_image_to_the_logits_it_had_and_to_no_others():
    case = Case(registry.resolve("avalanche_replay"), {"strategy": OWN[0][1], **SMALL})
    first, second = case.after(1).learner, case.after(2).learner
    tasks = stream(backbone())
    for c in range(4):
        group = f"strategy/storage_policy/buffer_groups/{c}"
        places, logits = second.memory[f"{group}/places"], second.memory[f"{group}/logits"]
        images = next(tasks.tasks[0].train.batches(999))[0][places[:, 1]]
        assert (tasks.tasks[0].train.labels[places[:, 1]] == c).all()
        with torch.inference_mode():
            then = first.logits(first.features(images))
        torch.testing.assert_close(logits[:, :4], then, atol=1e-5, rtol=1e-4)
        assert logits.shape[1] == 5 and logits[:, 4].isinf().all()
    output = torch.randn(6, 5, requires_grad=True)
    strategy = SimpleNamespace(batch_logits=logits[:2], replay_loader=iter([]), mb_output=output)
    stage._Recipe(case.config, context()).after_forward(strategy)
    F.mse_loss(output[:2], strategy.batch_logits).backward()
    torch.testing.assert_close(output.grad[:2, :4], 2 / 10 * (output[:2, :4] - logits[:2, :4]))
    assert (output.grad[:2, 4] == 0).all() and (output.grad[2:] == 0).all()


def test_icarl_decides_by_the_mean_of_its_herded_exemplars():
    """Exemplars, means and scores recomputed from the features; the scores are Avalanche's own classifier's."""
    from avalanche.models import NCMClassifier

    done = Case(registry.resolve("avalanche_replay"), {"strategy": OWN[1][1], **SMALL}).run()
    learner, tasks = done.learner, done.stream.tasks
    assert len(learner.means) == 8 and learner.memory.images <= 16
    where = [learner.memory[f"_ICaRLPlugin/x_memory/{c}/places"] for c in range(8)]
    for c, places in enumerate(where):
        task = tasks[int(places[0, 0])]
        everything, labels = next(task.train.batches(999))
        assert (labels[places[:, 1]] == c).all()
        with torch.inference_mode():
            sides = [F.normalize(learner.features(x)) for x in (everything, everything.flip(3))]
        mean = sum(side[places[:, 1]].mean(0) for side in sides)
        torch.testing.assert_close(learner.means[c], F.normalize(mean, dim=0), atol=1e-5, rtol=1e-4)
        if task.index == 2:  # chosen under the weights as they are now
            of_class = (labels == c).nonzero()[:, 0]
            assert set(places[:, 1].tolist()) == {int(of_class[i]) for i in herded(sides[0][of_class], len(places))}
    theirs = NCMClassifier(normalize=True)
    theirs.replace_class_means_dict(dict(enumerate(learner.means)))
    features = torch.randn(7, 48)
    torch.testing.assert_close(learner.logits(features), theirs(features), atol=1e-5, rtol=1e-4)


def herded(features, count):
    """iCaRL's algorithm 4: the next exemplar brings the mean of the chosen ones closest to the mean of all."""
    mean, chosen = features.mean(0), []
    while len(chosen) < count:
        total = features[chosen].sum(0)
        distance = (mean - (total + features) / (len(chosen) + 1)).norm(dim=1)
        distance[chosen] = float("inf")
        chosen.append(int(distance.argmin()))
    return chosen


def test_icarl_wants_new_classes(image_set):
    from cil.stream.protocol import DomainIncremental

    sets = [image_set([0, 1, 0, 1]), image_set([0, 1, 0, 1])]
    for images in sets:
        images.domains = np.array([0, 0, 1, 1])
    case = Case(registry.resolve("avalanche_replay"), {"strategy": "ICaRL", **PLAIN})
    with pytest.raises(StreamError, match="ICaRL is defined for tasks of new classes only"):
        run_stages(case.learner(), Stream(*sets, DomainIncremental()), accelerator=accelerator())
    for strategy in ("DER", HERDED[0], HERDED[1]):
        learner = Case(registry.resolve("avalanche_replay"), {"strategy": strategy, **PLAIN}).learner()
        assert len(run_stages(learner, Stream(*sets, DomainIncremental()), accelerator=accelerator())) == 2


@pytest.mark.filterwarnings("ignore")
def test_synaptic_intelligence_is_naive_here_and_therefore_refused():
    """If this fails, Avalanche has mended it: put it into the configs."""
    vit = backbone()
    theirs = dict(plain_script("SynapticIntelligence", {"si_lambda": 1e4}, stream(vit), vit).vit.named_parameters())
    for key, naive in naively_trained().items():
        torch.testing.assert_close(naive, theirs[key], atol=2e-5, rtol=1e-4)


def test_hyper_parameters_are_those_of_avalanches_constructors():
    everywhere = set(inspect.signature(supervised.Naive.__init__).parameters) | {"kwargs", "peval_mode"}
    ours = {"verbose", "buffer_transform", "feature_extractor", "classifier"}  # set here, not by the user
    for section in (*configs.FREE, *configs.STORING):
        name = section.model_fields["name"].default
        theirs = inspect.signature(getattr(supervised, name).__init__).parameters
        assert section.model_fields.keys() - {"name", "selection"} == theirs.keys() - everywhere - ours, name
        for key, field in section.model_fields.items():
            if key not in ("name", "selection") and theirs[key].default is not inspect.Parameter.empty:
                assert field.default == theirs[key].default, (name, key)
        assert name in stage.KEPT
    for name in configs.REFUSED:
        assert hasattr(supervised, name)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"strategy": {"name": "EWC", "ewc_lamda": 1}}, r"unknown key strategy.ewc_lamda \(did you mean 'ewc_lambda'"),
        ({"strategy": {"name": "EWC", "ewc_lambda": -1}}, "strategy.ewc_lambda: should be greater"),
        ({"strategy": {"name": "EWC", "mode": "online"}}, "decay_factor go together"),
        ({"strategy": "LWF"}, "unknown 'LWF'.*did you mean 'LwF'"),
        ({"strategy": "Replay"}, "Replay: it keeps old images; use the learner avalanche_replay"),
        ({"strategy": "GEM"}, "GEM: it keeps augmented pixels"),
        ({"strategy": "SynapticIntelligence"}, "it finds no change and equals Naive"),
        ({"micro_batch_size": 2}, "has no gradient accumulation"),
        ({"name": "avalanche_replay", "strategy": "EWC"}, "EWC: it keeps no images; use the learner avalanche"),
        ({"name": "avalanche_replay", "strategy": "DER", "label_smoothing": 0.1}, "the loss of DER has no label"),
    ],
)
def test_wrong_configurations_are_named_in_one_line(entry, message):
    with pytest.raises(ConfigError, match=message) as caught:
        registry.configure(LearnerEntry.model_validate({"name": "avalanche", **entry}))
    assert "\n" not in str(caught.value)


def test_a_diverging_run_and_a_precision_avalanche_does_not_know_are_reported():
    case = Case(registry.resolve("avalanche"), {"strategy": "Naive", **PLAIN, "lr": 1e30})
    with pytest.raises(TrainingError, match="stage 0: the training loss is"):
        case.run(stop_after=1)
    ctx = context()
    ctx.accelerator = SimpleNamespace(mixed_precision="fp16", device=torch.device("cpu"))
    learner, task = case.learner(), stream(backbone()).tasks[0]
    learner.begin(task, ctx)
    with pytest.raises(TrainingError, match="use bf16"):
        learner.learn(task, ctx)


def test_what_a_strategy_keeps_is_taken_apart_or_refused():
    learner = Case(registry.resolve("avalanche")).learner()
    codec = Codec({}, 3, torch.device("cpu"))
    values = {"a.b": {1: [torch.ones(2), None, (2.5, "x")], "k": {3, 4}}, "c": True}
    codec.save(values, learner.memory)
    back = codec.load(learner.memory)
    assert torch.equal(back["a.b"][1].pop(0), torch.ones(2))
    values["a.b"][1].pop(0)
    assert back == values
    with pytest.raises(TypeError, match="keeps a function"):
        codec.save({"x": test_lwf_without_weight_is_naive}, learner.memory)


def test_l2_sp_is_fine_tuning_with_a_pull_to_where_it_started():
    """One full-batch step of plain SGD against autograd, and α = β = 0 is finetune to the bit."""
    vit = backbone()
    recipe = {**PLAIN, "epochs": 1, "train_batch_size": 1000}
    learner = Case(registry.resolve("l2_sp"), {**recipe, "alpha": 0.7, "beta": 0.3}).learner(vit)
    task = on_digits(vit).tasks[0]
    learner.begin(task, context())
    for p in learner.tuner.parameters():
        p.data += 0.01
    start = {key: w.detach().clone() for key, w in learner.tuner.weights().items()}
    head = learner.head.weight.detach().clone()
    plain = copy.deepcopy(learner)
    object.__setattr__(plain, "config", learner.config.model_copy(update={"alpha": 0.0, "beta": 0.0}))
    learner.learn(task, context())
    plain.learn(task, context())
    for key, without in plain.tuner.weights().items():
        expected = without - 0.05 * 0.7 * (start[key] - dict(vit.model.named_parameters())[key])
        torch.testing.assert_close(learner.tuner.weights()[key], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(learner.head.weight, plain.head.weight - 0.05 * 0.3 * head, atol=1e-6, rtol=1e-5)
    free = Case(registry.resolve("l2_sp"), {**PLAIN, "alpha": 0, "beta": 0}).run().learner
    tuned = Case(registry.resolve("finetune"), PLAIN).run().learner
    assert all(torch.equal(a, b) for a, b in zip(free.parameters(), tuned.parameters(), strict=True))


# --- learners as strategies ----------------------------------------------------------------------------------------


def evaluator():
    from avalanche.evaluation.metrics import accuracy_metrics, forgetting_metrics
    from avalanche.logging import TextLogger
    from avalanche.training.plugins import EvaluationPlugin

    with io.StringIO() as nowhere:
        logger = TextLogger(nowhere)
    logger.file = io.StringIO()
    return EvaluationPlugin(
        accuracy_metrics(experience=True, stream=True), forgetting_metrics(stream=True), loggers=[logger]
    )


@pytest.mark.parametrize(
    ("name", "parameters", "vit", "per_class"),
    [
        pytest.param("ncm", {}, load_backbone, 6, marks=pytest.mark.slow),
        ("finetune", {**SMALL, "epochs": 2}, backbone, 12),
        pytest.param("joint", {**SMALL, "epochs": 2}, backbone, 12, marks=pytest.mark.slow),
    ],
)
def test_avalanches_metrics_of_a_learner_in_its_script_are_our_matrix(name, parameters, vit, per_class):
    vit = vit()
    rows = run_stages(
        Case(registry.resolve(name), parameters).learner(vit), on_digits(vit, per_class), accelerator=accelerator()
    )
    r, _, totals = results.matrices(rows)
    total = totals[-1]
    tasks = benchmark(on_digits(vit, per_class))
    strategy = as_strategy({"name": name, **parameters}, backbone=vit, evaluator=evaluator())
    seen = []
    for i, experience in enumerate(tasks.train_stream):
        strategy.train(experience)
        found = strategy.eval(tasks.test_stream)
        for j in range(3):
            accuracy = found[f"Top1_Acc_Exp/eval_phase/test_stream/Exp{j:03d}"]
            assert accuracy == (pytest.approx(r[i, j]) if j <= i else 0)
        correct = sum(r[i, : i + 1] * total[: i + 1])
        assert found["Top1_Acc_Stream/eval_phase/test_stream"] == pytest.approx(correct / sum(total))
        seen.append(found)
    assert seen[-1]["StreamForgetting/eval_phase/test_stream"] == pytest.approx(metrics.forgetting_from_first(r))
    assert "Top1_Acc_Stream" in strategy.evaluator.loggers[0].file.getvalue()


def labelled(vit, labels):
    """Digits whose ten classes have any integers as labels, as an Avalanche data set would come: pixels and targets."""
    from avalanche.benchmarks.utils import as_classification_dataset

    found = {}
    for split in ("train", "test"):
        tasks = on_digits(vit, sizes=(10,), order="natural")
        with tasks.open_test() as test:
            images, members = (test.images, test.task(0)[0]) if split == "test" else tasks.tasks[0].train.source
            pixels = torch.cat([batch for batch, _ in images.batches(members, members, 64)])
            plain = torch.utils.data.TensorDataset(
                pixels, torch.tensor(labels)[torch.as_tensor(images.labels[members])]
            )
        plain.targets = plain.tensors[1].tolist()
        found[split] = as_classification_dataset(plain)
    return found


LABELS = [12, 3, 7, 0, 5, 11, 4, 9, 1, 8]


def test_labels_may_be_any_and_come_in_any_order():
    """Nearest class means in a script whose labels are shuffled and have holes, against scikit-learn."""
    from avalanche.benchmarks import benchmark_from_datasets
    from sklearn.neighbors import NearestCentroid

    vit = backbone()
    sets = labelled(vit, LABELS)
    parts = [[7, 12, 0], [1, 9, 4, 8], [3, 5, 11]]

    def cut(dataset):
        return [dataset.subset([i for i, y in enumerate(dataset.targets) if y in part]) for part in parts]

    tasks = benchmark_from_datasets(train=cut(sets["train"]), test=cut(sets["test"]))
    strategy = as_strategy({"name": "ncm", "metric": "euclidean"}, backbone=vit, evaluator=evaluator())
    for experience in tasks.train_stream:
        strategy.train(experience)
    assert strategy.labels == [0, 7, 12, 1, 4, 8, 9, 3, 5, 11]

    def features(dataset):
        with torch.inference_mode():
            return vit(torch.stack([dataset[i][0] for i in range(len(dataset))])).numpy()

    theirs = NearestCentroid().fit(features(sets["train"]), list(sets["train"].targets))
    found = strategy.eval(tasks.test_stream)
    for j, part in enumerate(cut(sets["test"])):
        expected = theirs.score(features(part), list(part.targets))
        assert found[f"Top1_Acc_Exp/eval_phase/test_stream/Exp{j:03d}"] == pytest.approx(expected)


def test_before_any_training_nothing_is_right_and_periodic_evaluation_works():
    vit = backbone()
    tasks = benchmark(stream(vit))
    strategy = as_strategy("ncm", backbone=vit, evaluator=evaluator(), eval_every=0)
    assert strategy.eval(tasks.test_stream)["Top1_Acc_Stream/eval_phase/test_stream"] == 0
    found = strategy.train(tasks.train_stream[0], eval_streams=[tasks.test_stream])
    assert found["Top1_Acc_Exp/eval_phase/test_stream/Exp000"] > 0.5


def test_a_strategy_in_a_script_repeats_itself_and_leaves_the_global_state_alone():
    """With augmentation, which Avalanche's transforms draw from global states."""
    vit, states = backbone(), []
    for _ in range(2):
        before = random.getstate(), torch.get_rng_state()
        logged = []
        log = partial(_note, logged)
        strategy = as_strategy({"name": "finetune", **SMALL}, backbone=vit, evaluator=None, log=log)
        for experience in list(benchmark(stream(vit)).train_stream)[:2]:
            strategy.train(experience, eval_streams=[])
        states.append(strategy.learner.state_dict())
        assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
        assert logged.count("loss") == 2 * SMALL["epochs"]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    other = as_strategy({"name": "finetune", **SMALL}, backbone=vit, evaluator=None, seed=1)
    other.train(benchmark(stream(vit)).train_stream[0], eval_streams=[])
    assert not torch.equal(other.learner.state_dict()["head.weight"], states[0]["head.weight"][:4])


def _note(names, name, value):
    names.append(name)


def test_what_does_not_fit_a_script_is_refused():
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import AvalancheDataset, as_classification_dataset

    vit = backbone()
    again = benchmark(on_digits(vit, sizes=(10,))).train_stream[0]
    slca = as_strategy({"name": "slca", **SMALL, "milestones": [2], "samples": 4}, backbone=vit, evaluator=None)
    slca.train(again, eval_streams=[])
    with pytest.raises(StreamError, match="slca is defined for tasks of new classes only; experience 1 shows label 0"):
        slca.train(again, eval_streams=[])
    wrong = torch.utils.data.TensorDataset(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))
    wrong.targets = [0, 0]
    tasks = benchmark_from_datasets(train=[as_classification_dataset(wrong)])
    with pytest.raises(StreamError, match=r"torch.float32 \[3, 8, 8\]; the backbone needs float \[3, 32, 32\]"):
        as_strategy("ncm", backbone=vit, evaluator=None).train(tasks.train_stream[0], eval_streams=[])
    for targets, first in (([0, -1], "-1"), ([0.6, 1.0], r"0\.6"), ([True, False], "True"), (["a", "b"], "'a'")):
        wrong.targets = targets
        tasks = benchmark_from_datasets(train=[as_classification_dataset(wrong)])
        with pytest.raises(StreamError, match=rf"targets must be whole numbers from 0, .* e\.g\. {first}$"):
            as_strategy("ncm", backbone=vit, evaluator=None).train(tasks.train_stream[0], eval_streams=[])
    bare = benchmark_from_datasets(train=[AvalancheDataset([wrong])])
    with pytest.raises(StreamError, match="experience 0 has no images, or its data set has no attribute targets"):
        as_strategy("ncm", backbone=vit, evaluator=None).train(bare.train_stream[0], eval_streams=[])
    with pytest.raises(ConfigError, match="unknown key metrik"):
        as_strategy({"name": "ncm", "metrik": 1}, backbone=vit)
    with pytest.raises(BackboneError, match="timm knows no"):
        as_strategy("ncm", backbone="vit_tiny_patch8_65")


@pytest.mark.slow
def test_the_example_runs(capsys):
    """An ordinary Avalanche script, on real digits with the shipped backbone."""
    script = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "avalanche_script.py"))
    found = script["main"]()
    assert found["Top1_Acc_Stream/eval_phase/test_stream"] > 0.6
    assert "StreamForgetting/eval_phase/test_stream" in found
    assert "Top1_Acc_Stream/eval_phase/test_stream = 0." in capsys.readouterr().out
