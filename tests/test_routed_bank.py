"""Learners with a bank of experts: SMILE's layers against its formula, and routers against what they are defined as."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from marks import slow_beyond

from cil.errors import BackboneError, ConfigError
from cil.learner import Context
from cil.learners.bases.banked import experts_of
from cil.learners.bases.routers import Gates, OwnScale, certainty, of_tasks
from cil.learners.routed import Routed
from cil.learners.smile import Smile
from cil.merging import ExpertBank
from cil.testing import Case, parametrize_learner
from cil.testing.setting import SIZES, backbone, probe_images, stream
from cil.tuning import AddedWeights, ExternalWeights
from cil.tuning.token_experts import InputEnergies, TokenExperts

LORA = {"name": "lora", "rank": 2, "targets": ["fc1"]}
QUICK = {"tuner": LORA, "epochs": 1, "lr": 0.01}
LAYER = "blocks.1.mlp.fc1"


@parametrize_learner([("routed", {**QUICK, "router": "smile", "scores": "sum"})])
def test_common_checks(case, check):
    check(case)


@pytest.mark.slow
@parametrize_learner(
    [
        ("routed", {**QUICK, "scores": "task"}),
        ("routed", {**QUICK, "router": "entropy", "dtype": "bfloat16"}),
        ("routed", {**QUICK, "router": "gates"}),
        ("smile", {**QUICK, "prototypes": "linear"}),
        ("smile", {**QUICK, "tuner": "full", "lr": 0.001, "top": 2, "directions": 1, "max_rank": 3, "head": "ncm"}),
    ]
)
def test_common_checks_of_variants(case, check):
    check(case)


def bank_of(vit, updates):
    bank = ExpertBank().start(dict(vit.model.named_parameters()), names=[f"{LAYER}.weight", f"{LAYER}.bias"])
    for update in updates:
        bank.add_update(update)
    return bank


def draw(*shape, seed):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(vit, seed, rank=3):
    m, n = vit.model.get_parameter(f"{LAYER}.weight").shape
    update = draw(m, rank, seed=seed) @ draw(rank, n, seed=seed + 50) * 3
    return {f"{LAYER}.weight": update, f"{LAYER}.bias": draw(m, seed=seed + 90)}


# --- layers


@pytest.mark.parametrize(("top", "directions"), [(1, 2), (2, 2), (3, 9)])
def test_a_token_takes_the_experts_it_has_most_energy_in(top, directions):
    """The formula of the paper for every token, by full SVDs in numpy; experts of rank 3 have three directions."""
    vit = backbone()
    updates = [low_rank(vit, seed) for seed in range(3)]
    tuner = TokenExperts(vit, experts_of(bank_of(vit, updates)), directions, top)
    layer = tuner.model(vit.model).get_submodule(LAYER)
    x = draw(4, 5, updates[0][f"{LAYER}.weight"].shape[1], seed=7)
    with torch.no_grad():
        got, plain = layer(x).numpy(), vit.model.get_submodule(LAYER)(x).numpy()
    for token, before, after in zip(x.reshape(20, -1).numpy(), plain.reshape(20, -1), got.reshape(20, -1), strict=True):
        rho = []
        for update in updates:
            _, _, vt = np.linalg.svd(update[f"{LAYER}.weight"].numpy())
            rho.append(np.linalg.norm(vt[: min(directions, 3)] @ token))
        chosen = np.argsort(rho)[::-1][:top]
        p = np.exp(np.array(rho)[chosen])
        expected = before + sum(
            w * (updates[t][f"{LAYER}.weight"].numpy() @ token + updates[t][f"{LAYER}.bias"].numpy())
            for w, t in zip(p / p.sum(), chosen, strict=True)
        )
        np.testing.assert_allclose(after, expected, atol=1e-5)


def test_one_expert_is_its_task_and_a_second_equal_one_changes_nothing():
    vit = backbone()
    update = low_rank(vit, 1)
    theta = {name: vit.model.get_parameter(name) + delta for name, delta in update.items()}
    with torch.no_grad():
        expected = vit(probe_images(), ExternalWeights(theta))
        for updates in ([update], [update, update]):
            bank = bank_of(vit, updates)
            torch.testing.assert_close(vit(probe_images(), TokenExperts(vit, experts_of(bank))), expected)
            added = AddedWeights(dict(vit.model.named_parameters()), bank.products(0))
            torch.testing.assert_close(vit(probe_images(), added), expected)
        assert not torch.allclose(expected, vit(probe_images()), atol=1e-3)


def test_energies_are_shares_of_the_frozen_inputs():
    vit = backbone()
    updates, seen = [low_rank(vit, seed) for seed in range(2)], []
    handle = vit.model.get_submodule(LAYER).register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        vit(probe_images())
        handle.remove()
        tuner = InputEnergies(vit, experts_of(bank_of(vit, updates)), directions=2)
        got = tuner.energies(vit, probe_images())
    h = torch.nn.functional.normalize(seen[0], dim=-1).numpy()
    for t, update in enumerate(updates):
        _, _, vt = np.linalg.svd(update[f"{LAYER}.weight"].numpy())
        np.testing.assert_allclose(got[:, t], ((h @ vt[:2].T) ** 2).sum(-1).mean(1), atol=1e-5)


def test_layers_that_are_read_and_not_called_are_refused():
    import timm

    from cil.backbone import Backbone

    model = timm.create_model("beit_base_patch16_224", img_size=32, depth=1, embed_dim=48, num_heads=3, num_classes=0)
    vit = Backbone(model, "beit", {"input_size": (3, 32, 32)})
    weight = "blocks.0.attn.qkv.weight"
    bank = ExpertBank().start(dict(model.named_parameters()), names=[weight])
    bank.add_update({weight: torch.ones(144, 1) @ torch.ones(1, 48)})
    with pytest.raises(BackboneError, match=r"blocks.0.attn.qkv is read, not called, by \w+, so tokens cannot choose"):
        TokenExperts(vit, experts_of(bank))


# --- the learners


@pytest.fixture(scope="module", params=slow_beyond(["entropy"], ["frozen_lda", "entropy", "gates", "smile"]))
def learned(request):
    return Case(Routed, {**QUICK, "router": request.param}).run()


def test_classes_are_measured_through_their_own_expert_and_images_through_the_chosen_one(learned):
    learner, tasks = learned.learner.eval(), stream(learned.learner.backbone).tasks
    config = learner.config
    theta, vit = learner.models.initial, learner.backbone
    experts = [
        ExternalWeights({name: theta[name] + delta for name, delta in learner.bank.vector(t).items()}) for t in range(3)
    ]
    with torch.no_grad():
        for task in tasks:
            images, indices = task.train.source
            pixels = torch.cat([p for p, _ in images.batches(indices, indices, 64)])
            own, labels = vit(pixels, experts[task.index]), torch.as_tensor(task.train.labels)
            for c in task.classes:
                means = learner.classifier.means[c].float(), learner.frozen.means[c].float()
                torch.testing.assert_close(means[0], own[labels == c].mean(0), atol=1e-4, rtol=1e-3)
                torch.testing.assert_close(means[1], vit(pixels)[labels == c].mean(0), atol=1e-4, rtol=1e-3)
        images = probe_images()
        by_expert = torch.stack([learner.classifier.logits(vit(images, each)) for each in experts], 1)
        frozen, features = learner.frozen.logits(vit(images)), learner.features(images)
        routed = learner.route(features)
        p = frozen.double().softmax(1)
        sums = torch.stack([p[:, list(task.classes)].sum(1) for task in tasks], 1)
        q = by_expert.double().softmax(2)
        scores = {"frozen_lda": sums, "entropy": (q * q.clamp(min=1e-300).log()).sum(2)}
        torch.testing.assert_close(of_tasks(frozen, learner.task_of, 3), sums)
        torch.testing.assert_close(certainty(by_expert), scores["entropy"])
        gates, measured = Gates(vit.feature_dim, config.directions), []
        for task in tasks:
            source, indices = task.train.source
            pixels = torch.cat([p for p, _ in source.batches(indices, indices, 64)])
            gates.fit(vit(pixels))
            watch = InputEnergies(vit, experts_of(learner.bank), config.directions)
            own = watch.energies(vit, pixels)[:, task.index]
            e = watch.energies(vit, images)[:, task.index]
            measured.append((e - own.mean()) / (float(own.std(correction=0)) or 1.0))
        scores |= {"gates": gates(vit(images)), "smile": torch.stack(measured, 1)}
        assert torch.equal(routed, scores[config.router].argmax(1)) and len(set(routed.tolist())) > 1
        for t in range(3):
            tasks_given = torch.full((len(images),), t)
            got = {}
            for kind in ("all", "task", "sum"):
                learner.config = config.model_copy(update={"scores": kind})
                got[kind] = learner.routed_logits(features, tasks_given)
            torch.testing.assert_close(got["all"], by_expert[:, t], atol=1e-3, rtol=1e-3)
            summed = by_expert[:, t].log_softmax(1) + frozen.log_softmax(1)
            torch.testing.assert_close(got["sum"], summed, atol=1e-3, rtol=1e-3)
            own = list(tasks[t].classes)
            torch.testing.assert_close(got["task"][:, own], got["all"][:, own])
            others = [c for c in range(sum(SIZES)) if c not in own]
            assert bool((got["task"][:, others].amax(1) < got["all"][:, own].amin(1)).all())
    row = learned.rows[-1]
    assert 0 <= row["router_accuracy"] <= 1 and 0 <= row["oracle_router_accuracy"] <= 1


def test_the_bank_grows_by_the_factors_and_every_old_expert_stays():
    sizes: list[float] = []
    learner = Routed(Case(Routed, QUICK).config, backbone())
    for task in stream(learner.backbone).tasks:
        ctx = Context(stage=task.index, log=lambda name, value: sizes.append(value) if name == "bank_bytes" else None)
        learner.begin(task, ctx)
        before = {key: value.clone() for key, value in learner.bank.state_dict().items() if ":" in key}
        learner.learn(task, ctx)
        assert all(torch.equal(learner.bank.state_dict()[key], value) for key, value in before.items())
    blocks, rank, (m, n) = 3, 2, (192, 48)
    one = 4 * blocks * rank * (m + n)
    assert sizes == [one, one, 2 * one]  # the task of one class has nothing to train


def test_smile_of_one_task_is_that_task():
    learner = Case(Smile, QUICK).run(stop_after=1).learner.eval()
    theta = {name: learner.models.initial[name] + delta for name, delta in learner.rule.vector(0).items()}
    with torch.no_grad():
        expected = learner.backbone(probe_images(), ExternalWeights(theta))
        torch.testing.assert_close(learner.merged(probe_images()), expected, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(
            learner.features(probe_images())[:, : expected.shape[1]], learner.backbone(probe_images())
        )


@pytest.mark.parametrize("cls", [Routed, Smile])
def test_a_bank_keeps_updates_of_weights(cls):
    with pytest.raises(ConfigError, match="tuner adapter adds modules to the network, and a bank keeps updates"):
        cls(cls.Config(tuner="adapter"), backbone())


# --- what routers learn


def test_gates_are_ridge_regressions_beside_protected_directions():
    gates, tasks = Gates(8, 2), [draw(30, 8, seed=t) + draw(8, seed=20 + t) for t in range(3)]
    basis = np.zeros((8, 0))
    for t, x in enumerate(tasks):
        old = gates.weights.clone()
        gates.fit(x)
        assert torch.equal(gates.weights[:t], old)
        u = x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
        rest = u - u @ basis @ basis.T
        gram = rest.T @ rest
        w = np.linalg.solve(gram + 0.1 * np.trace(gram) / 8 * np.eye(8), rest.sum(0))
        np.testing.assert_allclose(gates.weights[t], w, atol=1e-5)
        assert np.abs(basis.T @ w).max(initial=0) < 1e-6
        basis = np.concatenate([basis, np.linalg.eigh(gram)[1][:, ::-1][:, :2]], 1)
        np.testing.assert_allclose(gates.protected @ gates.protected.T, basis @ basis.T, atol=1e-5)
        np.testing.assert_allclose(gates(x), u @ gates.weights.double().numpy().T, atol=1e-5)
    for x in tasks[:1] * 3:  # eight directions are all there are: nothing is left for more
        gates.fit(x)
    assert gates.protected.shape == (8, 8) and bool((gates.weights[5].abs() < 1e-3).all())


def test_scores_are_relative_to_a_tasks_own_images():
    scale = OwnScale()
    scale.fit(torch.tensor([1.0, 3.0]))
    scale.fit(torch.tensor([5.0]))  # one image has no deviation
    torch.testing.assert_close(scale(torch.tensor([[4.0, 7.0]])), torch.tensor([[2.0, 2.0]]))
